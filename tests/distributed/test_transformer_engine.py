"""Transformer Engine's layers, chosen by the spec and called as it publishes them, on the CPU by a stand-in.

What its kernels compute was not run: the stand-in computes in torch (tests/te_standin.py). What is held is
that Megatron-Core's spec and ours fit its signatures, that the weights start and are saved as those of our
own layers, and that FP8's flags arrive as its recipes.
"""

import pytest

from tests.distributed.launch import launch
from tests.te_source import FOLDER
from tests.tiny import SAVED_AT, assert_same_course, read_metrics

pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(
        not FOLDER.exists(), reason=f"{FOLDER} is not there: source requirements/install.sh dev"
    ),
]
TP = ["--tensor-model-parallel-size", "2", "--sequence-parallel"]
VP = ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"]
STOP_AT = SAVED_AT + 3
MATRICES = ["self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"]


def train(size, corpus, *runs):
    """Runs these command lines with its layers, and returns the recipes that any rank met in each."""
    lines = [[*corpus.flags, "--eval-iters", "0", *run] for run in runs]
    ranks = launch("tests.distributed.te_jobs:train", size, command_lines=lines)
    return [{k: v for rank in ranks for k, v in rank[number].items()} for number in range(len(runs))]


def test_its_layers_train_as_ours_and_read_our_checkpoints(corpus, trained, tmp_path):
    ours = str(trained.folder / f"iter_{SAVED_AT:07d}")
    log = {name: str(tmp_path / f"{name}.jsonl") for name in ("whole", "tp", "vp", "resumed", "back")}
    until = ["--train-iters", str(STOP_AT)]
    save = ["--save", str(tmp_path / "theirs"), "--train-iters", str(SAVED_AT)]
    [recipes] = train(1, corpus, [*save, "--metrics-file", log["whole"]])
    assert recipes == {f"decoder.layers.{i}.{name}": "none" for i in range(4) for name in MATRICES}
    train(
        2,
        corpus,
        [*TP, *until, "--metrics-file", log["tp"]],
        [*VP, *until, "--metrics-file", log["vp"]],
        [*TP, *until, "--load", ours, "--metrics-file", log["resumed"]],
    )
    theirs = str(tmp_path / "theirs" / f"iter_{SAVED_AT:07d}")
    line = [*corpus.flags, "--eval-iters", "0", *until, "--load", theirs, "--metrics-file", log["back"]]
    launch("tests.distributed.jobs:train", 1, command_lines=[line])
    expected = {i: dict(step) for i, step in trained.metrics.items()}
    for step in expected.values():
        step.pop("validation_loss", None)
    for name, file in log.items():
        found = read_metrics(file)
        assert min(found) == (SAVED_AT + 1 if name in ("resumed", "back") else 1)
        assert_same_course(found, expected)


def test_the_flags_of_fp8_arrive_as_its_recipes(corpus):
    fp8 = [
        "--ffn-hidden-size",
        "192",
        "--bf16",
        "--train-iters",
        "2",
        "--lr-decay-iters",
        "20",
        "--fp8-format",
    ]
    delayed = [*fp8, "hybrid", "--fp8-margin", "1", "--fp8-amax-history-len", "16"]
    delayed += ["--fp8-amax-compute-algo", "max", "--no-fp8-wgrad"]
    first_last = ["--first-last-layers-bf16", "--num-layers-at-start-in-bf16", "2"]
    runs = {
        "DelayedScaling": delayed,
        "Float8CurrentScaling": [*fp8, "hybrid", "--fp8-recipe", "tensorwise", *first_last],
        "Float8BlockScaling": [*fp8, "e4m3", "--fp8-recipe", "blockwise"],
        "MXFP8BlockScaling": [*fp8, "e4m3", "--fp8-recipe", "mxfp8"],
    }
    *under_tp, under_vp = train(2, corpus, *([*TP, *run] for run in runs.values()), [*VP, *delayed])
    for name, recipes in zip(runs, under_tp, strict=True):
        assert recipes.keys() == {f"decoder.layers.{i}.{matrix}" for i in range(4) for matrix in MATRICES}
        kept = {0, 1, 3} if name == "Float8CurrentScaling" else set()
        for matrix, recipe in recipes.items():
            if int(matrix.split(".")[2]) in kept:
                assert recipe == "none"
            else:
                assert name in recipe and f"format={'HYBRID' if 'hybrid' in runs[name] else 'E4M3'}" in recipe
    [text] = set(under_vp.values())
    for told in ("margin=1", "amax_history_len=16", "reduce_amax=True"):
        assert told in text
