"""Every layout trains the model of one process: initial weights, tokens, losses and gradient norms."""

import functools

import pytest
import torch

from megatron_codec.flags import parse_pretrain
from megatron_codec.model.weights import named_parameters
from tests.distributed.jobs import hash_of
from tests.distributed.launch import launch
from tests.llama import small_model
from tests.tiny import FLAGS, SAVED_AT, STEPS, assert_same_course, read_metrics

pytestmark = pytest.mark.timeout(600)  # one start of processes runs through many layouts
TP = ["--tensor-model-parallel-size", "2"]
PP = ["--pipeline-model-parallel-size", "2"]
VP = [*PP, "--num-virtual-stages-per-pipeline-rank", "2"]
CP = ["--context-parallel-size", "2"]
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather"]
SELECTIVE = ["--recompute-granularity", "selective", "--recompute-modules", "mlp", "layernorm"]
LAYOUTS = {
    "TP=2": (2, TP),
    "PP=2": (2, PP),
    "DP=2": (2, []),
    "TP=2, sequence parallel": (2, [*TP, "--sequence-parallel"]),
    "DP=2, overlapped": (2, OVERLAP),
    "PP=2, recomputed": (2, [*PP, "--recompute-granularity", "full"]),
    "PP=2 interleaved": (2, VP),
    "CP=2": (2, CP),
    "TP=2, MLP and norms recomputed": (2, [*TP, *SELECTIVE]),
    "TP=2, PP=2 interleaved, sequence parallel": (4, [*TP, *VP, "--sequence-parallel"]),
    "PP=2 interleaved, DP=2, overlapped": (4, [*VP, *OVERLAP]),
    "CP=2, TP=2, sequence parallel": (4, [*CP, *TP, "--sequence-parallel"]),
}
# Four processes on two cores take ten seconds a layout.
SLOW_LAYOUTS = {
    "TP=2, DP=2": (4, TP),
    "CP=2, PP=2": (4, [*CP, *PP]),
    "TP=2, PP=2": (4, [*TP, *PP]),
    "TP=4, sequence parallel": (4, ["--tensor-model-parallel-size", "4", "--sequence-parallel"]),
    "PP=4": (4, ["--pipeline-model-parallel-size", "4"]),
    "TP=2, PP=2, sequence parallel": (4, [*TP, *PP, "--sequence-parallel"]),
    "PP=2, DP=2": (4, PP),
    "TP=4": (4, ["--tensor-model-parallel-size", "4"]),
    "TP=2, DP=2, sequence parallel": (4, [*TP, "--sequence-parallel"]),
    "TP=2, PP=2 interleaved": (4, [*TP, *VP]),
    "CP=2, DP=2": (4, CP),
    "CP=4": (4, ["--context-parallel-size", "4"]),
    "DP=4, overlapped": (4, OVERLAP),
    "TP=2, PP=2, DP=2": (8, [*TP, *PP]),
    "TP=4, DP=2": (8, ["--tensor-model-parallel-size", "4"]),
    "PP=4, DP=2": (8, ["--pipeline-model-parallel-size", "4"]),
    "TP=2, PP=2 interleaved, CP=2, sequence parallel": (8, [*TP, *VP, *CP, "--sequence-parallel"]),
    "TP=2, CP=2, DP=2": (8, [*TP, *CP]),
    "TP=4, PP=2": (8, ["--tensor-model-parallel-size", "4", *PP]),
    "TP=2, PP=4": (8, [*TP, "--pipeline-model-parallel-size", "4"]),
    "DP=8, overlapped": (8, [*OVERLAP, "--micro-batch-size", "1"]),
}


@pytest.fixture(scope="module")
def run_all(corpus, tmp_path_factory):
    """Trains under all layouts of a number of processes, the slow ones or the others, in one start."""

    @functools.cache
    def run(world_size: int, slow: bool):
        folder = tmp_path_factory.mktemp(f"world-{world_size}")
        layouts = SLOW_LAYOUTS if slow else LAYOUTS
        chosen = {n: f for n, (size, f) in layouts.items() if size == world_size}
        files = {name: folder / f"{number}.jsonl" for number, name in enumerate(chosen)}
        flags = [*corpus.flags, "--train-iters", str(length(slow))]
        lines = [[*flags, *chosen[name], "--metrics-file", str(files[name])] for name in chosen]
        ranks = launch("tests.distributed.jobs:train", world_size, command_lines=lines)
        return {
            name: (read_metrics(files[name]), [results[number] for results in ranks])
            for number, name in enumerate(chosen)
        }

    return run


def length(slow: bool) -> int:
    """Steps that a layout is trained for: both numbers end with a validation."""
    return STEPS if slow else SAVED_AT


def check(layout, run_all, trained):
    slow = layout in SLOW_LAYOUTS
    world_size, flags = LAYOUTS.get(layout) or SLOW_LAYOUTS[layout]
    metrics, ranks = run_all(world_size, slow)[layout]
    assert len(metrics) == length(slow) and "validation_loss" in metrics[SAVED_AT]
    assert_same_course(metrics, trained.metrics)
    # Every process knows the validation loss.
    assert {rank["validation_loss"] for rank in ranks} == {metrics[length(slow)]["validation_loss"]}

    config = parse_pretrain(flags).parallel
    tp, pp = config.tensor_model_parallel_size, config.pipeline_model_parallel_size
    vp = config.num_virtual_stages_per_pipeline_rank
    for step in range(length(slow)):
        # Ranks of one model replica read the same samples; the replicas together read those of one process.
        replicas = {tuple(rank["rows"][step]) for rank in ranks}
        assert len(replicas) == world_size // config.model_parallel_size
        assert sorted(row for rows in replicas for row in rows) == sorted(trained.rows[step])

    whole = initial_weights()
    for number, rank in enumerate(ranks):
        tp_rank, pp_rank = number % tp, number // (world_size // pp)
        expected = {
            name: hash_of(part_of(name, tensor, tp, tp_rank))
            for name, tensor in whole.items()
            if is_on_stage(name, pp, vp, pp_rank)
        }
        assert rank["weights"] == expected


@functools.cache
def initial_weights():
    """The whole model of tests/tiny.py before its first step, made in this process."""
    config = parse_pretrain(FLAGS)
    return dict(named_parameters(small_model(config.model, config.training.seed)[0]))


def part_of(name, tensor, tp, rank):
    """How Megatron-Core cuts a weight: matrices that widen by rows, those that narrow by columns."""
    if "norm" in name:
        return tensor
    if name.endswith("linear_fc1.weight"):  # [gate; up], each cut
        return torch.cat([half.chunk(tp)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(tp, dim=1 if "linear_proj" in name or "linear_fc2" in name else 0)[rank]


def is_on_stage(name, pp, vp, stage):
    if "layers." in name:
        return int(name.split(".")[2]) // (4 // (pp * vp)) % pp == stage
    return stage == (0 if "embedding" in name else pp - 1)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layout_trains_the_model_of_one_process(layout, run_all, trained):
    check(layout, run_all, trained)


@pytest.mark.slow
def test_four_interleaved_stages_train_the_model_of_one_process(corpus, tmp_path):
    """They need eight layers."""
    files = {name: str(tmp_path / f"{name}.jsonl") for name in ("whole", "cut")}
    flags = [*corpus.flags, "--num-layers", "8", "--metrics-file"]
    four = ["--pipeline-model-parallel-size", "4", "--num-virtual-stages-per-pipeline-rank", "2"]
    launch("tests.distributed.jobs:train", 1, command_lines=[[*flags, files["whole"]]])
    launch("tests.distributed.jobs:train", 4, command_lines=[[*flags, files["cut"], *four]])
    assert_same_course(read_metrics(files["cut"]), read_metrics(files["whole"]))


@pytest.mark.slow
@pytest.mark.parametrize("layout", SLOW_LAYOUTS)
def test_more_layouts_train_the_model_of_one_process(layout, run_all, trained):
    check(layout, run_all, trained)


def test_emulated_fp8_is_that_of_one_process(corpus, tmp_path):
    """A pipeline rounds as one process does. Under TP sums have another order, and what lies at a border of
    the format is rounded to another side: the same at first, and then another course near by."""
    flags = [*corpus.flags, "--train-iters", str(SAVED_AT), "--fp8-format", "hybrid", "--fp8-emulation"]
    runs = {"whole": (1, []), "PP": (2, VP), "TP": (2, [*TP, "--sequence-parallel"])}
    files = {name: str(tmp_path / f"{name}.jsonl") for name in runs}
    for size in (1, 2):
        chosen = [
            [*flags, *more, "--metrics-file", files[name]] for name, (n, more) in runs.items() if n == size
        ]
        launch("tests.distributed.jobs:train", size, command_lines=chosen)
    whole = read_metrics(files["whole"])
    assert_same_course(read_metrics(files["PP"]), whole)
    cut = read_metrics(files["TP"])
    assert_same_course({i: step for i, step in cut.items() if i <= 2}, whole)
    for iteration, step in cut.items():
        assert step["loss"] == pytest.approx(whole[iteration]["loss"], rel=1e-2)


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
