"""A checkpoint goes on as if the run had never stopped: under every layout, after kill -9, after SIGTERM."""

import functools
import itertools
import signal
import time
from pathlib import Path

import pytest
import torch

from megatron_codec.training import checkpoint
from tests.distributed.launch import RankFailed, launch, running_tool, wait_for_all
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
ALONE = "one process"
RING = dict(itertools.pairwise([*LAYOUTS, ALONE]))
# Every layout reads itself and the one before it, of which one process is one.
PAIRS = [
    (writer, reader)
    for writer, reader in itertools.product(LAYOUTS, LAYOUTS)
    if reader in (writer, RING[writer])
]
SLOW_PAIRS = [pair for pair in itertools.product(LAYOUTS, LAYOUTS) if pair not in PAIRS]
STOP_AT = SAVED_AT + 2
AFTER = list(range(SAVED_AT + 1, STOP_AT + 1))
WRITE = ["--eval-iters", "0", "--train-iters", str(SAVED_AT)]
READ = ["--eval-iters", "0", "--train-iters", str(STOP_AT)]


def newest_checkpoint(folder: Path) -> int:
    return int((folder / "latest_checkpointed_iteration.txt").read_text())


def read(source: Path, layout: str, log: Path) -> list[str]:
    """The command line that goes on from a checkpoint."""
    start = source / f"iter_{SAVED_AT:07d}"
    return [*LAYOUTS[layout][1], *READ, "--load", str(start), "--metrics-file", str(log)]


@pytest.fixture(scope="module")
def run(corpus):
    """Runs command lines in so many processes."""

    def start(world_size: int, lines: list[list[str]]) -> None:
        lines = [[*corpus.flags, *line] for line in lines]
        launch("tests.distributed.jobs:train", world_size, command_lines=lines)

    return start


@pytest.fixture(scope="module")
def logs_of(run, trained, tmp_path_factory):
    """What runs logged that went on from a checkpoint, by (layout that wrote it, layout that read it)."""

    @functools.cache
    def of(pairs: tuple[tuple[str, str], ...]):
        folder = tmp_path_factory.mktemp("checkpoints")
        saved = {name: folder / f"written under {name}" for name in LAYOUTS} | {ALONE: trained.folder}
        files = {pair: folder / f"{'-'.join(pair)}.jsonl" for pair in pairs}
        writing = [[*LAYOUTS[n][1], *WRITE, "--save", str(saved[n])] for n in LAYOUTS if n != ALONE]
        reading = {
            size: [read(saved[w], r, log) for (w, r), log in files.items() if LAYOUTS[r][0] == size]
            for size in (1, 2)
        }
        run(2, [*writing, *reading[2]])
        if reading[1]:
            run(1, reading[1])
        return {pair: read_metrics(file) for pair, file in files.items()}

    return of


@pytest.mark.parametrize(("writer", "reader"), PAIRS)
def test_goes_on_under_another_layout(writer, reader, logs_of, trained):
    log = logs_of(tuple(PAIRS))[writer, reader]
    assert list(log) == AFTER
    assert_same_course(log, trained.metrics)


@pytest.mark.slow
@pytest.mark.parametrize(("writer", "reader"), SLOW_PAIRS)
def test_goes_on_under_more_layouts(writer, reader, logs_of, trained):
    log = logs_of(tuple(SLOW_PAIRS))[writer, reader]
    assert list(log) == AFTER
    assert_same_course(log, trained.metrics)


def test_bf16_goes_on_with_its_fp32_main_weights(run, tmp_path):
    """One pair is enough: data parallelism changes nothing that bf16 rounds, so that one process can be held
    to the tolerance of fp32."""
    run(2, [[*READ, "--bf16", "--save", str(tmp_path), "--save-interval", str(SAVED_AT)]])
    run(1, [[*read(tmp_path, ALONE, tmp_path / "resumed.jsonl"), "--bf16"]])
    resumed = read_metrics(tmp_path / "resumed.jsonl")
    assert list(resumed) == AFTER
    assert_same_course(resumed, read_metrics(tmp_path / "metrics.jsonl"))


def test_emulated_fp8_goes_on_with_its_scales(run, tmp_path):
    """They are part of the checkpoint; an interleaved pipeline goes on as itself."""
    fp8 = ["--fp8-format", "hybrid", "--fp8-emulation"]
    fp8 += ["--fp8-amax-history-len", "4", "--fp8-amax-compute-algo", "max"]
    layout, log = "PP=2 interleaved", tmp_path / "resumed.jsonl"
    save = ["--save", str(tmp_path), "--save-interval", str(SAVED_AT)]
    run(2, [[*LAYOUTS[layout][1], *fp8, *READ, *save]])
    run(2, [[*read(tmp_path, layout, log), *fp8]])
    resumed = read_metrics(log)
    assert list(resumed) == AFTER
    assert_same_course(resumed, read_metrics(tmp_path / "metrics.jsonl"), tolerance=1e-7)


def test_overlapped_updates_are_in_the_checkpoint(corpus, tmp_path):
    """What another process has updated arrives with the next forward pass, and so after the checkpoint."""
    overlap = ["--overlap-grad-reduce", "--overlap-param-gather"]
    lines = [
        [*corpus.flags, "--eval-iters", "0", "--train-iters", "3", "--save", str(tmp_path / name), *flags]
        for name, flags in (("plain", []), ("overlapped", overlap))
    ]
    ranks = launch("tests.distributed.jobs:train", 2, command_lines=lines)
    assert not any(run["children"] for runs in ranks for run in runs), "of the writers none is left"
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
    save, steps = tmp_path / "save", 20
    # Long enough to be stopped before its end.
    arguments = [*corpus.flags, "--save", str(save), "--load", str(save), "--train-iters", str(steps)]
    log = save / "metrics.jsonl"
    with running_tool("pretrain", arguments, 2, tmp_path) as processes:
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
    assert 3 <= stopped < steps
    assert newest_checkpoint(save) == stopped
    assert f"stopped on request at iteration {stopped}" in (tmp_path / "output-0.txt").read_text()

    with running_tool("pretrain", arguments, 2, tmp_path) as processes:
        wait_for_all(processes, tmp_path, timeout=120)
    assert f"at iteration {stopped}" in (tmp_path / "output-0.txt").read_text()
    course = read_metrics(log)
    assert_same_course({i: step for i, step in course.items() if i <= STEPS}, trained.metrics)
    assert newest_checkpoint(save) == max(course) == steps
