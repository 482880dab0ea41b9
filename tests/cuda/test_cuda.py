"""On a GPU, what the CPU computes: training, checkpoints, the engine, Transformer Engine if it is installed.

    python -m pytest tests/cuda      # on a machine with a GPU; elsewhere they are skipped

The CPU's run is the one that other tests hold against their oracles. Sums of fp32 come in another order on a
GPU, so a course is compared to 1e-4. Transformer Engine multiplies fp32 in TF32, and bf16 and FP8 round: they
are held to what that costs.
"""

import math
import subprocess
from importlib.util import find_spec

import pytest
from PIL import Image

from megatron_codec.tokenizer import Tokenizer
from tests.conftest import GPUS
from tests.distributed.launch import launch
from tests.tiny import CODEC, SAVED_AT, STEPS, assert_same_course, read_metrics


def count_gpus() -> int:
    """As nvidia-smi lists them: to ask torch would take hold of one."""
    try:
        found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return found.stdout.count("GPU ") if found.returncode == 0 else 0


COUNT = count_gpus()
HAS_ENGINE = find_spec("transformer_engine") is not None
ON_GPU = {"CUDA_VISIBLE_DEVICES": GPUS or "0"}
pytestmark = [
    pytest.mark.timeout(600),
    pytest.mark.skipif(not COUNT, reason="there is no GPU: nvidia-smi lists none"),
]
needs_engine = pytest.mark.skipif(
    not HAS_ENGINE, reason="Transformer Engine is not installed: pip install 'transformer-engine[pytorch]'"
)
LAYOUTS = {
    "DP": ["--overlap-grad-reduce", "--overlap-param-gather"],
    "TP": ["--tensor-model-parallel-size", "2", "--sequence-parallel"],
    "PP": ["--pipeline-model-parallel-size", "2"],
    "CP": ["--context-parallel-size", "2"],
}


def train(lines: list[list[str]], transformer_engine: bool = False, size: int = 1):
    """Runs these command lines on GPUs and returns what rank 0 says of each run."""
    ranks = launch(
        "tests.cuda.cuda_jobs:train",
        size,
        environment=ON_GPU if size == 1 else {"CUDA_VISIBLE_DEVICES": GPUS or "0,1"},
        command_lines=lines,
        transformer_engine=transformer_engine,
    )
    return ranks[0]


def assert_near(course, reference, tolerance: float, norm: float) -> None:
    """Losses within `tolerance` of those of the reference, norms of gradients within `norm`."""
    for iteration, step in course.items():
        expected = reference[iteration]
        said = f"iteration {iteration}: {step}, of the reference {expected}"
        assert math.isclose(step["loss"], expected["loss"], rel_tol=tolerance), said
        assert math.isclose(step["grad_norm"], expected["grad_norm"], rel_tol=norm), said


@pytest.fixture(scope="module")
def courses(corpus, trained, tmp_path_factory):
    """Folder of the runs of our own layers on one GPU, what they say, and what they logged.

    Weights are drawn where they are: a run that begins on a GPU has others than one that begins on a CPU.
    """
    folder = tmp_path_factory.mktemp("gpu")
    ours = str(trained.folder / f"iter_{SAVED_AT:07d}")
    lines = {
        "resumed": ["--load", ours],
        "recomputed": ["--load", ours, "--recompute-granularity", "full"],
        "fp32": ["--save", str(folder / "checkpoint"), "--save-interval", str(SAVED_AT)],
        "bf16": ["--bf16", "--eval-iters", "0"],
    }
    command_lines = [
        [*corpus.flags, *line, "--metrics-file", str(folder / name)] for name, line in lines.items()
    ]
    runs = dict(zip(lines, train(command_lines), strict=True))
    return folder, runs, {name: read_metrics(folder / name) for name in lines}


def test_training_takes_the_course_of_the_cpu(courses, trained):
    """From a checkpoint of the CPU on."""
    _, runs, logged = courses
    for name in ("resumed", "recomputed"):
        assert "CUDA over NCCL" in runs[name]["platform"]
        assert runs[name]["devices"] == ["cuda"]
        assert runs[name]["kinds"]["core_attention"] == "SdpaAttention"
        assert list(logged[name]) == list(range(SAVED_AT + 1, STEPS + 1))
        assert_same_course(logged[name], trained.metrics, 1e-4)


def test_the_cpu_takes_the_course_of_the_gpu(courses, corpus, tmp_path):
    """From a checkpoint of the GPU on."""
    folder, _, logged = courses
    theirs = str(folder / "checkpoint" / f"iter_{SAVED_AT:07d}")
    line = [*corpus.flags, "--load", theirs, "--metrics-file", str(tmp_path / "back")]
    launch("tests.distributed.jobs:train", 1, command_lines=[line])
    back = read_metrics(tmp_path / "back")
    assert list(back) == list(range(SAVED_AT + 1, STEPS + 1))
    assert_same_course(back, logged["fp32"], 1e-4)


def test_bf16_is_near_fp32(courses):
    _, _, logged = courses
    assert_near(logged["bf16"], logged["fp32"], 1e-2, 1e-1)


def test_the_engine_says_what_the_cpu_says(corpus, trained):
    """Scores of real pictures, greedy and drawn samples; without graphs, in bf16 and with weights in int8."""
    tokenizer = Tokenizer.load(corpus.tokenizer)
    prompts = [
        [tokenizer.bos, *tokenizer.encode(CODEC.prompt(CODEC.encode(Image.open(path)), 0.5)).tolist()]
        for path in sorted(corpus.pictures.iterdir())[:4]
    ]
    engines = {
        "fp32": {},
        "chunks": {"prefill_chunk_size": 7, "max_batch_size": 3},
        "no graphs": {"cuda_graphs": False},
        "bf16": {"dtype": "bfloat16"},
        "int8": {"weight_dtype": "int8"},
    }
    asked = {
        "checkpoint_folder": str(trained.folder),
        "prompts": prompts,
        "sampling": {"n": 3, "seed": 4, "top_k": 40, "top_p": 0.9},
        "greedy": {"temperature": 0.0},
    }
    [cpu] = launch("tests.cuda.cuda_jobs:sample", 1, engines={"fp32": {}, "int8": engines["int8"]}, **asked)
    [gpu] = launch("tests.cuda.cuda_jobs:sample", 1, environment=ON_GPU, engines=engines, **asked)
    expected = cpu["fp32"]
    assert expected["device"] == "cpu"
    tolerances = {"fp32": 2e-5, "chunks": 2e-5, "no graphs": 2e-5, "bf16": 0.1}
    for name, found in gpu.items():
        assert found["device"] == "cuda"
        assert found["valid"] == [True] * 4
        reference = cpu.get(name, expected)
        for ours, theirs in zip(found["prompt"], reference["prompt"], strict=True):
            assert ours == pytest.approx(theirs, abs=tolerances.get(name, 1e-3)), name
        if name in ("fp32", "chunks", "no graphs"):
            assert found["greedy"] == expected["greedy"], name
            assert found["ids"] == expected["ids"], name


@needs_engine
def test_transformer_engine_trains_as_our_layers_do(courses, corpus, tmp_path):
    """In fp32 (its TF32), in bf16 and in FP8, and its checkpoints go on with our layers."""
    _, _, ours = courses
    fp8 = ["--bf16", "--eval-iters", "0", "--ffn-hidden-size", "192", "--fp8-format"]
    lines = {
        "fp32": ["--eval-iters", "0"],
        "bf16": ["--bf16", "--eval-iters", "0", "--save", str(tmp_path / "save"), "--save-interval", "10"],
        "resumed": ["--bf16", "--eval-iters", "0", "--load", str(tmp_path / "save" / "iter_0000010")],
        "wider": fp8[:-1],
        "delayed": [*fp8, "hybrid", "--save", str(tmp_path / "fp8"), "--save-interval", "10"],
        "delayed resumed": [*fp8, "hybrid", "--load", str(tmp_path / "fp8" / "iter_0000010")],
        "tensorwise": [*fp8, "hybrid", "--fp8-recipe", "tensorwise"],
    }
    runs = train(
        [[*corpus.flags, *line, "--metrics-file", str(tmp_path / name)] for name, line in lines.items()],
        transformer_engine=True,
    )
    for run in runs:
        assert run["kinds"]["core_attention"] == "TEDotProductAttention"
    course = {name: read_metrics(tmp_path / name) for name in lines}
    assert_near(course["fp32"], ours["fp32"], 1e-2, 5e-2)
    assert_near(course["bf16"], ours["fp32"], 1e-2, 1e-1)
    assert_near(course["delayed"], course["wider"], 3e-2, 5e-1)
    assert_near(course["tensorwise"], course["wider"], 3e-2, 5e-1)
    for name in ("delayed", "tensorwise"):  # FP8 rounds: the same losses would mean that it was not used
        assert course[name][STEPS]["loss"] != course["wider"][STEPS]["loss"]
    for name, whole in (("resumed", "bf16"), ("delayed resumed", "delayed")):
        assert min(course[name]) == 11
        assert_near(course[name], course[whole], 1e-3, 2e-2)
    line = [*corpus.flags, "--bf16", "--eval-iters", "0", "--load", str(tmp_path / "save" / "iter_0000010")]
    train([[*line, "--metrics-file", str(tmp_path / "ours")]])
    assert_near(read_metrics(tmp_path / "ours"), course["bf16"], 1e-2, 1e-1)


@pytest.mark.skipif(COUNT < 2, reason=f"two GPUs are needed, and nvidia-smi lists {COUNT}")
@pytest.mark.parametrize("engine", [False, pytest.param(True, marks=needs_engine)], ids=["ours", "TE"])
def test_two_gpus_over_nccl_take_the_course_of_one(engine, courses, corpus, tmp_path):
    lines = [
        [*corpus.flags, "--eval-iters", "0", *line, "--metrics-file", str(tmp_path / name)]
        for name, line in LAYOUTS.items()
    ]
    train(lines, engine, size=2)
    for name in LAYOUTS:
        tolerance = (1e-2, 5e-2) if engine else (1e-4, 1e-3)
        assert_near(read_metrics(tmp_path / name), courses[2]["fp32"], *tolerance)
