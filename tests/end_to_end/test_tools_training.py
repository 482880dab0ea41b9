"""tools/pretrain.py and tools/generate.py as a user runs them: under torchrun, and with many a mistake."""

import json
import os
import shutil
import subprocess
import sys
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image

from megatron_codec.data import write_dataset
from tests.forks import ROOT, run_tool
from tests.tiny import CODEC, STEPS, make_corpus, read_metrics

TP = ["--tensor-model-parallel-size", "2"]


def first_of(world_size: int | None) -> dict[str, str]:
    """Variables of the first of so many processes."""
    if world_size is None:
        return {}
    return {"RANK": "0", "WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}


class Mistake(NamedTuple):
    """A command line, and what has to be said about it: each message with the beginning of its remedy.

    Names in braces are places that `places` makes.
    """

    tool: str
    arguments: str
    messages: list[str]
    world_size: int | None = None


MISTAKES = {
    "layout, data, checkpoint and numbers at once": Mistake(
        "pretrain",
        "{flags} --tensor-model-parallel-size 3 --pipeline-model-parallel-size 3 --log-interval 0 --lr nan "
        "--train-data-path {nothing} --load {empty} --save {save}",
        [
            "4 processes: must be a multiple of --tensor-model-parallel-size 3 x "
            "--pipeline-model-parallel-size 3 = 9; start 9 processes",
            "--tensor-model-parallel-size 3: must divide --num-attention-heads 4; use one of 1, 2, 4",
            "--tensor-model-parallel-size 3: must divide --ffn-hidden-size 160; use one of 1, 2, 4, 5",
            "--tensor-model-parallel-size 3: must divide --make-vocab-size-divisible-by 128; use one",
            "--pipeline-model-parallel-size 3: must divide --num-layers 4; use one of 1, 2, 4",
            "--lr nan: must be at least 0 and finite; leave it out",
            "--log-interval 0: must be at least 1; leave it out",
            "{nothing}.json: there is no such dataset; give the prefix",
            "--load {empty}: holds no checkpoint (no readable latest_checkpointed_iteration.txt in it); give",
        ],
        world_size=4,
    ),
    "batch and sequence that do not divide, flags that need another": Mistake(
        "pretrain",
        "{flags} --tensor-model-parallel-size 2 --sequence-parallel --seq-length 161 --micro-batch-size 3 "
        "--finetune --save-interval 5",
        [
            "--seq-length 161: must be a multiple of --tensor-model-parallel-size 2 under "
            "--sequence-parallel; use 160",
            "--global-batch-size 8: must be a multiple of --micro-batch-size 3 x DP 1 = 3; use 9",
            "--save-interval 5: needs --save; name",
            "--finetune: needs --load; name",
        ],
        world_size=2,
    ),
    "a dataset of another tokenizer": Mistake(
        "pretrain",
        "{flags} --train-data-path {other}/train --valid-data-path {other}/valid --load {trained} "
        "--save {save}",
        [
            "--load {trained}: was trained with another tokenizer than the dataset was made with; make the "
            "dataset with the tokenizer of the checkpoint",
        ],
    ),
    "validation data of another tokenizer, a checkpoint of another shape": Mistake(
        "pretrain",
        "{flags} --valid-data-path {other}/valid --load {trained} --save {save} --num-layers 2 "
        "--ffn-hidden-size 96",
        [
            "--valid-data-path {other}/valid: was made with another tokenizer or codec than {corpus}/train; "
            "make both",
            "--load {trained}: is a model of another shape: it has num_layers 4, not 2; ffn_hidden_size 160, "
            "not 96; give the same",
        ],
    ),
    "a fresh run over an old one": Mistake(
        "pretrain",
        "{flags} --save {trained}",
        ["--save {trained}: holds the checkpoints of a run already, and this one starts anew; add --load"],
    ),
    "an unknown preset": Mistake(
        "pretrain",
        "--preset jpeglm-70b",
        ["--preset jpeglm-70b: is not known; use one of jpeglm-7b, avclm-7b, jpeglm-tiny, avclm-tiny"],
    ),
    "a damaged checkpoint to train on": Mistake(
        "pretrain",
        "{flags} --load {damaged} --save {save} --train-iters 30",
        ["{damaged}: cannot be loaded"],
    ),
    "sampling, pictures, layout and numbers at once": Mistake(
        "generate",
        "--load {trained} --output {output} --temperature -1 --top-k -3 --top-p 2 --max-tokens 0 "
        "--num-samples 0 --max-batch-size 0 --prompt-ratio 1.5 --num-prompts 0 "
        "--tensor-model-parallel-size 3 --prompt-image {torn} {text} {nothing} {picture} {picture}",
        [
            "--num-samples 0: must be at least 1; leave it out",
            "--num-prompts 0: must be at least 1; leave it out",
            "--prompt-ratio 1.5: must lie between 0 and 1; use 0.5",
            "temperature -1.0: must be a finite number, 0 or more; use 1.0, or 0",
            "top_k -3: must be 0 (all tokens) or more; use 0",
            "top_p 2.0: must lie above 0 and not above 1; use 1.0",
            "max_tokens 0: must be at least 1; leave it out",
            "--prompt-image {torn}: cannot be read",
            "--prompt-image {text}: cannot be read",
            "--prompt-image {nothing}: cannot be read",
            "--prompt-image {picture}: has the name of another prompt picture, and samples are named after "
            "them; rename",
            "--max-batch-size 0: must be at least 1; leave it out",
            "1 processes: must be a multiple of --tensor-model-parallel-size 3 = 3; start 3",
            "--tensor-model-parallel-size 3: must divide --num-attention-heads 4; use one of 1, 2, 4",
            "--tensor-model-parallel-size 3: must divide --ffn-hidden-size 160; use one",
            "--tensor-model-parallel-size 3: must divide --make-vocab-size-divisible-by 128; use one",
        ],
    ),
    "more processes than the engine needs": Mistake(
        "generate",
        "--load {trained} --output {output} --tensor-model-parallel-size 2",
        ["4 processes: generation needs TP x PP = 2: every process works on the same samples; start 2"],
        world_size=4,
    ),
    "no checkpoint, and a file where the samples should go": Mistake(
        "generate",
        "--load {empty} --output {text}",
        [
            "--output {text}: is a file; name a folder",
            "--load {empty}: holds no checkpoint (no readable latest_checkpointed_iteration.txt in it); give",
        ],
    ),
    "a damaged checkpoint to sample from": Mistake(
        "generate", "--load {damaged} --output {output}", ["{damaged}: cannot be loaded"]
    ),
    "prompts made with another codec": Mistake(
        "generate",
        "--load {trained} --output {output} --prompt-data-path {larger}",
        ["--prompt-data-path {larger}: was made with {{'name': 'jpeg', 'settings': {{'image_size': 64}}}}, "],
    ),
}


@pytest.fixture(scope="module")
def places(corpus, trained, tmp_path_factory) -> dict[str, Any]:
    """What stands in braces."""
    folder = tmp_path_factory.mktemp("mistakes")
    other = make_corpus(tmp_path_factory.mktemp("other"), vocab_size=300)
    places = {name: folder / name for name in ("nothing", "empty", "torn", "text", "damaged", "larger")}
    places["empty"].mkdir()
    picture = next(corpus.pictures.iterdir())
    places["torn"].write_bytes(picture.read_bytes()[:200])
    places["text"].write_text("not a picture")
    write_dataset(
        places["larger"],
        [np.arange(9, dtype=np.uint16)],
        {"name": "jpeg", "settings": {"image_size": 64}},
        {"hash": "0"},
    )
    shutil.copytree(trained.folder / f"iter_{STEPS:07d}", places["damaged"])
    for file in places["damaged"].glob("*.distcp"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    return places | {
        "flags": corpus.flags,
        "corpus": Path(corpus.train).parent,
        "trained": trained.folder,
        "other": Path(other.train).parent,
        "picture": picture,
        "save": folder / "save",
        "output": folder / "output",
    }


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_told_with_value_rule_and_remedy(name, places):
    mistake = MISTAKES[name]
    words = [places["flags"] if w == "{flags}" else [w.format(**places)] for w in mistake.arguments.split()]
    variables = first_of(mistake.world_size)
    outcome = run_tool(mistake.tool, *chain.from_iterable(words), environment=variables)
    assert outcome.returncode == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    told = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    expected = [f"error: {message.format(**places)}" for message in MISTAKES[name].messages]
    assert len(told) == len(expected), told
    for line, beginning in zip(told, expected, strict=True):
        assert line.startswith(beginning)
        assert "; " in line  # the remedy
    assert not places["save"].exists() and not places["output"].exists()


def test_an_unknown_flag_is_refused_by_both_tools(tmp_path):
    for tool, arguments in (
        ("pretrain", ["--tensor-parallel", "2"]),
        ("generate", ["--load", "x", "--output", str(tmp_path / "y"), "--dtype", "float16"]),
    ):
        outcome = run_tool(tool, *arguments)
        assert outcome.returncode == 2
        assert arguments[-2] in outcome.stderr and "Traceback" not in outcome.stderr


def test_from_torchrun_to_pictures(corpus, tmp_path):
    """Training on two processes, then completions of two pictures by one, from nothing but the checkpoint."""
    save, board, output = (tmp_path / name for name in ("save", "board", "output"))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"),
        *(str(ROOT / "tools/pretrain.py"), *corpus.flags, *TP, "--train-iters", "6"),
        *("--save", str(save), "--tensorboard-dir", str(board)),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    training = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200)
    assert training.returncode == 0, training.stderr
    metrics = read_metrics(save / "metrics.jsonl")
    assert list(metrics) == [1, 2, 3, 4, 5, 6]
    assert metrics[6]["loss"] < metrics[1]["loss"]
    for line in (f"lm loss: {metrics[6]['loss']:.6E}", "TP=2 PP=1 DP=1", "validation loss at iteration 6"):
        assert training.stdout.count(line) == 1  # one process speaks for all
    assert tensorboard_scalars(board)["loss"] == pytest.approx([metrics[i]["loss"] for i in metrics])

    pictures = sorted(corpus.pictures.iterdir())[:2]
    generation = run_tool(
        "generate", "--load", save, "--output", output, "--prompt-image", *pictures, "--num-samples", 3,
        "--prompt-ratio", 0.5, "--seed", 8,
    )  # fmt: skip
    assert generation.returncode == 0, generation.stderr
    summary = json.loads((output / "samples.json").read_text())
    assert summary["samples"] == 6 and summary["seed"] == 8
    files = [output / sample["file"] for sample in summary["files"]]
    assert {file.name for file in output.iterdir()} == {"samples.json", "contact_sheet.png"} | {
        f.name for f in files
    }
    sheet = np.asarray(Image.open(output / "contact_sheet.png"))
    assert sheet.shape[1] > 5 * 96  # prompt, three samples, original, each enlarged to 96 pixels
    prompt = sheet[18 : 18 + 96, 4 : 4 + 96]  # below the headings; the lower half is not given
    assert (prompt[48:] == 128).all() and prompt[:48].std() > 10
    for file, picture in zip(files, [pictures[0]] * 3 + [pictures[1]] * 3, strict=True):
        assert file.stem.startswith(picture.stem) and file.suffix == ".jpg"
        sample = np.asarray(Image.open(file).convert("RGB"))
        original = np.asarray(CODEC.decode(CODEC.encode(Image.open(picture))))
        assert sample.shape == original.shape
        # The prompt is the upper half; chroma is interpolated over the border.
        np.testing.assert_array_equal(sample[:14], original[:14])
    assert len({file.read_bytes() for file in files}) == 6


def tensorboard_scalars(folder: Path) -> dict[str, list[float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [event.value for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}
