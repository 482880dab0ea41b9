"""A checkpoint goes on as if the run had never stopped: under every layout, after kill -9, after SIGTERM."""

import itertools
import signal
import sys
import time
from pathlib import Path

import pytest
import torch

from megatron_codec.training import checkpoint
from tests.distributed.launch import ROOT, RankFailed, launch, running, wait_for_all
from tests.llama import small_model
from tests.tiny import SAVED_AT, STEPS, assert_same_course, read_metrics

pytestmark = pytest.mark.timeout(600)  # one start of processes runs through many layouts
LAYOUTS = {
    "one process": (1, []),
    "TP=2": (2, ["--tensor-model-parallel-size", "2"]),
    "PP=2": (2, ["--pipeline-model-parallel-size", "2"]),
    "DP=2": (2, []),
    "PP=2 interleaved": (
        2,
        ["--pipeline-model-parallel-size", "2", "--num-virtual-stages-per-pipeline-rank", "2"],
    ),
    "CP=2": (2, ["--context-parallel-size", "2"]),
}
STOP_AT = SAVED_AT + 4
AFTER = list(range(SAVED_AT + 1, STOP_AT + 1))
WRITE = ["--eval-iters", "0", "--train-iters", str(SAVED_AT)]
READ = ["--eval-iters", "0", "--train-iters", str(STOP_AT)]


def newest_checkpoint(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


@pytest.fixture(scope="module")
def logs(corpus, trained, tmp_path_factory):
    """What runs logged that went on from a checkpoint, by (layout that wrote it, layout that read it).

    In bf16 one pair is enough: data parallelism changes nothing that bf16 rounds, so its run that never
    stopped (under the key "bf16") can be held to the tolerance of fp32. Of emulated FP8, whose scales are
    part of the checkpoint, an interleaved pipeline goes on as itself.
    """
    folder = tmp_path_factory.mktemp("checkpoints")
    saved = {name: folder / f"written under {name}" for name in LAYOUTS} | {"one process": trained.folder}
    files = {pair: folder / f"{'-'.join(pair)}.jsonl" for pair in itertools.product(LAYOUTS, LAYOUTS)}

    def write(name):
        return [*LAYOUTS[name][1], *WRITE, "--save", str(saved[name])]

    def read(source, name, log):
        start = source / f"iter_{SAVED_AT:07d}"
        return [*LAYOUTS[name][1], *READ, "--load", str(start), "--metrics-file", str(log)]

    def run(world_size, lines):
        lines = [[*corpus.flags, *line] for line in lines]
        launch("tests.distributed.jobs:train", world_size, command_lines=lines)

    whole = [*LAYOUTS["DP=2"][1], *READ, "--bf16", "--save", str(folder), "--save-interval", str(SAVED_AT)]
    reading = {
        size: [
            read(saved[writer], reader, log)
            for (writer, reader), log in files.items()
            if LAYOUTS[reader][0] == size
        ]
        for size in (1, 2)
    }
    fp8 = [*LAYOUTS["PP=2 interleaved"][1], "--fp8-format", "hybrid", "--fp8-emulation"]
    fp8 += ["--fp8-amax-history-len", "4", "--fp8-amax-compute-algo", "max"]
    saved_fp8, log_fp8 = folder / "fp8", folder / "fp8.jsonl"
    whole_fp8 = [*fp8, *READ, "--save", str(saved_fp8), "--save-interval", str(SAVED_AT)]
    resumed_fp8 = [*fp8, *READ, "--load", str(saved_fp8 / f"iter_{SAVED_AT:07d}")]
    run(
        2,
        [
            *map(write, (name for name, (size, _) in LAYOUTS.items() if size == 2)),
            *reading[2],
            whole,
            whole_fp8,
        ],
    )
    run(2, [[*resumed_fp8, "--metrics-file", str(log_fp8)]])
    files["bf16"], files["bf16 resumed"] = folder / "metrics.jsonl", folder / "bf16.jsonl"
    run(1, [*reading[1], [*read(folder, "one process", files["bf16 resumed"]), "--bf16"]])
    files["fp8"], files["fp8 resumed"] = saved_fp8 / "metrics.jsonl", log_fp8
    return {name: read_metrics(file) for name, file in files.items()}


@pytest.mark.parametrize("reader", LAYOUTS)
@pytest.mark.parametrize("writer", LAYOUTS)
def test_goes_on_under_another_layout(writer, reader, logs, trained):
    assert list(logs[writer, reader]) == AFTER
    assert_same_course(logs[writer, reader], trained.metrics)


def test_bf16_goes_on_with_its_fp32_main_weights(logs):
    assert list(logs["bf16 resumed"]) == AFTER
    assert_same_course(logs["bf16 resumed"], logs["bf16"])


def test_emulated_fp8_goes_on_with_its_scales(logs):
    assert list(logs["fp8 resumed"]) == AFTER
    assert_same_course(logs["fp8 resumed"], logs["fp8"], tolerance=1e-7)


def test_overlapped_updates_are_in_the_checkpoint(corpus, tmp_path):
    """What another process has updated arrives with the next forward pass, and so after the checkpoint."""
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather"]
    lines = [
        [*corpus.flags, "--eval-iters", "0", "--train-iters", "3", "--save", str(tmp_path / name), *flags]
        for name, flags in (("plain", []), ("overlapped", overlap))
    ]
    launch("tests.distributed.jobs:train", 2, command_lines=lines)
    plain, overlapped = (weights_in(tmp_path / name) for name in ("plain", "overlapped"))
    for name, weight in plain.items():
        torch.testing.assert_close(overlapped[name], weight, atol=1e-6, rtol=0, msg=name)


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    start = checkpoint.latest(folder)
    model = checkpoint.Description.read(start).model
    module, _ = small_model(model)
    before = {name: weight.detach().clone() for name, weight in module.named_parameters()}
    checkpoint.load_weights(start, [module])
    weights = {name: weight.detach() for name, weight in module.named_parameters()}
    assert not any(torch.equal(weight, before[name]) for name, weight in weights.items())
    return weights


def test_a_run_killed_while_it_saves_goes_on_from_the_checkpoint_before(corpus, trained, tmp_path):
    command_line = [*corpus.flags, "--save", str(tmp_path), "--load", str(tmp_path), "--save-interval", "5"]
    with pytest.raises(RankFailed) as failure:
        launch("tests.distributed.jobs:train_and_die_in_save", 1, command_line=command_line, iteration=10)
    assert failure.value.statuses == [-signal.SIGKILL]
    assert (tmp_path / ".iter_0000010.tmp").is_dir() and not (tmp_path / "iter_0000010").exists()
    assert newest_checkpoint(tmp_path) == 5
    assert max(read_metrics(tmp_path / "metrics.jsonl")) == 10

    launch("tests.distributed.jobs:train", 1, command_lines=[command_line])
    assert_same_course(trained.metrics, read_metrics(tmp_path / "metrics.jsonl"))
    assert newest_checkpoint(tmp_path) == STEPS
    assert not list(tmp_path.glob(".*"))


def test_sigterm_saves_and_the_same_command_goes_on(corpus, trained, tmp_path):
    save = tmp_path / "save"
    command = [
        sys.executable,
        str(ROOT / "tools/pretrain.py"),
        *corpus.flags,
        "--save",
        str(save),
        "--load",
        str(save),
    ]
    log = save / "metrics.jsonl"
    with running([command, command], tmp_path) as processes:
        deadline = time.monotonic() + 120
        while not log.exists() or len(log.read_text().splitlines()) < 3:
            assert time.monotonic() < deadline and processes[0].poll() is None, (
                tmp_path / "output-0.txt"
            ).read_text()
            time.sleep(0.01)
        # To one process alone, as a scheduler may do: the others must learn of it.
        processes[1].send_signal(signal.SIGTERM)
        wait_for_all(processes, tmp_path, timeout=120)
    stopped = max(read_metrics(log))
    assert 3 <= stopped < STEPS
    assert newest_checkpoint(save) == stopped
    assert f"stopped on request at iteration {stopped}" in (tmp_path / "output-0.txt").read_text()

    with running([command, command], tmp_path) as processes:
        wait_for_all(processes, tmp_path, timeout=120)
    assert f"at iteration {stopped}" in (tmp_path / "output-0.txt").read_text()
    assert_same_course(trained.metrics, read_metrics(log))
    assert newest_checkpoint(save) == STEPS
