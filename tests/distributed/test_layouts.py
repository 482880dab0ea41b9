"""Every layout trains the model of one process: losses, gradient norms and tokens, step by step."""

import functools

import pytest

from tests.distributed.launch import launch
from tests.tiny import STEPS, assert_same_course, read_metrics

TP = ["--tensor-model-parallel-size", "2"]
PP = ["--pipeline-model-parallel-size", "2"]
LAYOUTS = {
    "TP=2": (2, TP),
    "PP=2": (2, PP),
    "DP=2": (2, []),
    "TP=2, sequence parallel": (2, [*TP, "--sequence-parallel"]),
    "DP=2, overlapped": (2, ["--overlap-grad-reduce", "--overlap-param-gather"]),
    "PP=2, recomputed": (2, [*PP, "--recompute-granularity", "full"]),
    "TP=2, PP=2": (4, [*TP, *PP]),
    "TP=2, PP=2, sequence parallel": (4, [*TP, *PP, "--sequence-parallel"]),
    "TP=2, DP=2": (4, TP),
    "PP=2, DP=2": (4, PP),
}
LARGE_LAYOUTS = {
    "TP=2, PP=2, DP=2": (8, [*TP, *PP]),
    "TP=4, DP=2": (8, ["--tensor-model-parallel-size", "4"]),
    "PP=4, DP=2": (8, ["--pipeline-model-parallel-size", "4"]),
}


@pytest.fixture(scope="module")
def run_all(corpus, tmp_path_factory):
    """Trains under all layouts of a number of processes, in one start of them."""

    @functools.cache
    def run(world_size: int):
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        chosen = {n: f for n, (size, f) in (LAYOUTS | LARGE_LAYOUTS).items() if size == world_size}
        files = {name: folder / f"{number}.jsonl" for number, name in enumerate(chosen)}
        lines = [[*corpus.flags, *chosen[name], "--metrics-file", str(files[name])] for name in chosen]
        ranks = launch("tests.distributed.jobs:train", world_size, command_lines=lines)
        return {
            name: (read_metrics(files[name]), [results[number] for results in ranks])
            for number, name in enumerate(chosen)
        }

    return run


def check(layout, world_size, flags, run_all, trained):
    metrics, ranks = run_all(world_size)[layout]
    assert len(metrics) == STEPS and "validation_loss" in metrics[STEPS // 2]
    assert_same_course(metrics, trained.metrics)
    assert_same_course(trained.metrics, metrics)
    # Every process knows the validation loss.
    assert {rank["validation_loss"] for rank in ranks} == {metrics[STEPS]["validation_loss"]}
    for step in range(STEPS):
        # Ranks of one model replica read the same samples; the replicas together read those of one process.
        replicas = {tuple(rank["rows"][step]) for rank in ranks}
        assert len(replicas) == data_parallel_size(world_size, flags)
        assert sorted(row for rows in replicas for row in rows) == sorted(trained.rows[step])


def data_parallel_size(world_size, flags):
    for size in flags:
        world_size //= int(size) if size.isdigit() else 1
    return world_size


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_the_model_of_one_process(layout, run_all, trained):
    check(layout, *LAYOUTS[layout], run_all, trained)


@pytest.mark.slow
@pytest.mark.parametrize("layout", LARGE_LAYOUTS)
def test_eight_processes_train_the_model_of_one(layout, run_all, trained):
    check(layout, *LARGE_LAYOUTS[layout], run_all, trained)


def test_no_two_steps_see_the_same_samples(trained):
    seen = [row for rows in trained.rows for row in rows]
    assert len(trained.rows) == STEPS and len(seen) == 8 * STEPS == len(set(seen))


def test_the_comparison_sees_a_gradient_that_is_not_summed(corpus, trained, tmp_path):
    """Norm weights are 1% of the model: a fault in their gradients is what a loose comparison would miss."""
    file = str(tmp_path / "metrics.jsonl")
    flags = [*corpus.flags, *TP, "--sequence-parallel", "--metrics-file", file, "--train-iters", "2"]
    launch("tests.distributed.jobs:train_with_unmarked_norms", 2, command_lines=[flags])
    with pytest.raises(AssertionError, match="iteration 1: grad_norm"):
        assert_same_course(read_metrics(file), trained.metrics)
