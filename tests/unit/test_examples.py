"""The job scripts of examples/: which command they come to, within SLURM and without, and what they refuse.

`scontrol` and `srun` are stand-ins here; tests/slurm/run.sh has the real ones.
"""

import os
import shlex
import shutil
import subprocess
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest

from megatron_codec.flags import parse_pretrain
from megatron_codec.presets import PRESETS

ROOT = Path(__file__).resolve().parents[2]
JPEG, AVC = "examples/pretrain_jpeglm_7b.sh", "examples/pretrain_avclm_7b.sh"
SCRIPTS = [*sorted((ROOT / "examples").glob("pretrain_*.sh")), *sorted((ROOT / "tests/slurm").glob("*.sh"))]
OURS = (
    "SLURM_",
    "EXTRA_",
    "PRESET",
    "TP",
    "PP",
    "CP",
    "VP",
    "FP8",
    "DATA",
    "TRAIN_DATA",
    "VALID_DATA",
    "SAVE",
    "GPUS",
    "PRINT",
)


def start(script, *arguments, **variables):
    """Runs a script, with PRINT=1 unless told otherwise, whatever the surroundings of the tests have set."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    return subprocess.run(
        ["bash", script, *arguments],
        cwd=ROOT,
        env=clean | {"PRINT": "1"} | variables,
        capture_output=True,
        text=True,
        timeout=60,
    )


def printed(*arguments, **variables) -> list[str]:
    done = start(*arguments, **variables)
    assert done.returncode == 0, done.stderr
    return shlex.split(done.stdout)


def parsed(command):
    """The configuration that the command hands to tools/pretrain.py."""
    return parse_pretrain(command[command.index("tools/pretrain.py") + 1 :])


def value(command, flag):
    return command[command.index(flag) + 1]


@pytest.fixture
def four_nodes(tmp_path):
    """The variables of a job on n1..n4 with 8 GPUs each, and stand-ins on PATH."""
    for name, text in {
        "scontrol": '[ "$*" = "show hostnames n[1-4]" ] && printf "n%s\\n" 1 2 3 4',
        "srun": 'printf "srun was called: %s\\n" "$*"',
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    return {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NUM_NODES": "4",
        "SLURM_JOB_NODELIST": "n[1-4]",
        "SLURM_GPUS_ON_NODE": "8",
        "DATA": "data/x",
    }


@pytest.mark.parametrize(("script", "preset"), [(JPEG, "jpeglm-7b"), (AVC, "avclm-7b")])
def test_four_nodes_of_eight(four_nodes, script, preset):
    command = printed(script, **four_nodes)
    node = command.index("torchrun")
    assert command[0] == "srun"
    assert [value(command, flag) for flag in ("--nodes", "--ntasks", "--ntasks-per-node")] == ["4", "4", "1"]
    assert command[node - 3 : node] == ["bash", JPEG, "--on-node"]
    assert [value(command[node:], flag) for flag in ("--nnodes", "--nproc-per-node")] == ["4", "8"]
    assert value(command, "--rdzv-backend") == "c10d"
    assert value(command, "--rdzv-endpoint") == "n1:23456"
    assert value(command, "--rdzv-id") == "123456"

    config = parsed(command)
    assert not list(config.faults(32))
    assert config.model == PRESETS[preset].model
    assert config.training == replace(PRESETS[preset].training, recompute_granularity=None)
    layout = config.parallel
    assert (layout.tensor_model_parallel_size, layout.pipeline_model_parallel_size) == (2, 1)
    assert layout.context_parallel_size == {"jpeglm-7b": 1, "avclm-7b": 2}[preset]
    assert config.fp8.fp8_format is None
    assert layout.sequence_parallel and layout.overlap_grad_reduce and layout.overlap_param_gather
    assert config.checkpoint.save == config.checkpoint.load == f"runs/{preset}"
    assert config.data.data_path == ("data/x",)


@pytest.mark.parametrize(
    ("steps", "fault", "queued"),
    [(5, 0, True), (10, 0, False), (5, 1, False)],
    ids=["stopped", "done", "failed"],
)
def test_a_job_that_is_asked_to_stop_is_queued_again_if_it_has_to_be(
    tmp_path, four_nodes, steps, fault, queued
):
    # Of srun: SLURM's signal arrives while it runs, is handed on to it, and it ends a little later.
    (tmp_path / "srun").write_text(
        f"#!/bin/bash\ntrap 'touch {tmp_path}/told' USR1\nkill -USR1 $PPID\nsleep 0.5\nexit {fault}\n"
    )
    with (tmp_path / "scontrol").open("a") as stand_in:
        stand_in.write(f'[ "$1" != requeue ] || echo "$*" > {tmp_path}/queued\n')
    (tmp_path / "latest_checkpointed_iteration.txt").write_text(str(steps))
    arguments = ("--train-iters", "10", "--lr-warmup-iters", "2")
    done = start(JPEG, *arguments, **four_nodes, PRINT="", SAVE=str(tmp_path))
    assert done.returncode == fault, done.stderr
    assert (tmp_path / "told").exists()
    asked = tmp_path / "queued"
    assert (asked.read_text().split() if asked.exists() else []) == (["requeue", "123456"] if queued else [])


def test_the_header_asks_for_what_the_layout_needs():
    for script in (JPEG, AVC):
        header = [line for line in (ROOT / script).read_text().splitlines() if line.startswith("#SBATCH")]
        for option in ("--nodes=4", "--gpus-per-node=8", "--requeue", "--open-mode=append"):
            assert f"#SBATCH {option}" in header
        assert any(line.startswith("#SBATCH --signal=B:USR1@") for line in header)


def test_without_slurm():
    command = printed(JPEG, DATA="x", GPUS_PER_NODE="4")
    assert command[0] == "torchrun" and "--standalone" in command and "--nnodes" not in command
    assert value(command, "--nproc-per-node") == "4"
    assert not list(parsed(command).faults(4))


def test_gpus_are_counted(tmp_path, four_nodes):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nprintf 'GPU 0: A\\nGPU 1: A\\nGPU 2: A\\nGPU 3: A\\n'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    assert value(printed(JPEG, DATA="x", PATH=four_nodes["PATH"]), "--nproc-per-node") == "4"
    # An allocation knows better than the node where the script is started.
    of_job = {**four_nodes, "SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "a100:8"}
    assert value(printed(JPEG, **of_job), "--nproc-per-node") == "8"


def test_another_preset_and_layout():
    command = printed(
        AVC, PRESET="jpeglm-tiny", TP="2", CP="1", GPUS_PER_NODE="2", TRAIN_DATA="a", VALID_DATA="b"
    )
    config = parsed(command)
    assert config.model == PRESETS["jpeglm-tiny"].model
    assert config.parallel.tensor_model_parallel_size == 2 and config.parallel.sequence_parallel
    assert (config.data.train_data_path, config.data.valid_data_path) == (("a",), ("b",))
    alone = parsed(printed(JPEG, PRESET="jpeglm-tiny", TP="1", GPUS_PER_NODE="1", DATA="x"))
    assert not alone.parallel.sequence_parallel


def test_pieces_of_the_model_and_of_the_sequence():
    config = parsed(printed(JPEG, TP="1", PP="2", VP="4", CP="2", GPUS_PER_NODE="8", DATA="x"))
    assert config.parallel.num_virtual_stages_per_pipeline_rank == 4
    assert config.parallel.context_parallel_size == 2 and not config.parallel.sequence_parallel
    assert not list(config.run_faults(8))


def test_fp8_by_the_delayed_recipe():
    # On a machine without Transformer Engine the flags are refused with their reason, so not printed.
    done = start(JPEG, DATA="x", GPUS_PER_NODE="2", FP8="hybrid")
    if find_spec("transformer_engine") is None:
        assert done.returncode == 2 and "--fp8-format hybrid: needs Transformer Engine" in done.stderr
    # The last flags win.
    config = parsed(printed(JPEG, "--fp8-emulation", DATA="x", GPUS_PER_NODE="2", FP8="hybrid"))
    fp8 = config.fp8
    assert (fp8.fp8_format, fp8.fp8_recipe) == ("hybrid", "delayed")
    assert (fp8.fp8_amax_history_len, fp8.fp8_amax_compute_algo) == (1024, "max")


def test_arrays_are_replaced_and_extended():
    config = parsed(
        printed(
            *(JPEG, "--lr", "3e-3", "--train-iters", "30"),
            GPUS_PER_NODE="2",
            MODEL_ARGS="--preset jpeglm-tiny --num-layers 2",
            TRAINING_ARGS="--global-batch-size 12  --lr 1e-3 --lr-warmup-iters 2",
            EXTRA_TRAINING_ARGS="--lr 2e-3 --min-lr 1e-4",
            MODEL_PARALLEL_ARGS="--tensor-model-parallel-size 1",
            DATA_ARGS="--mock-data",
            EXTRA_LOGGING_ARGS="--log-interval 1",
            SAVE="a b",
        )
    )
    assert config.model.num_layers == 2 and config.model.hidden_size == 128
    assert config.training.lr == 3e-3 and config.training.min_lr == 1e-4
    assert config.training.global_batch_size == 12 and config.training.train_iters == 30
    assert config.parallel.tensor_model_parallel_size == 1 and not config.parallel.overlap_grad_reduce
    assert config.data.mock_data
    assert config.logging.log_interval == 1 and config.logging.eval_interval == 1000
    assert config.checkpoint.save == "a b"


@pytest.mark.parametrize(
    ("arguments", "variables", "words"),
    [
        ((), {}, ["DATA", "is not set", "preprocess_jpeg.py"]),
        (
            (),
            {"DATA": "x", "GPUS_PER_NODE": "5"},
            ["5 processes", "multiple of --tensor-model-parallel-size 2"],
        ),
        ((), {"DATA": "x", "GPUS_PER_NODE": "all"}, ["GPUS_PER_NODE=all", "a number above 0"]),
        ((), {"DATA": "x", "VENV": "/nowhere"}, ["VENV=/nowhere", "bin/activate"]),
        (("--mock-data",), {"DATA": "x", "GPUS_PER_NODE": "4"}, ["--mock-data given", "exactly one"]),
        (("--learning-rate", "1"), {"DATA": "x", "GPUS_PER_NODE": "4"}, ["--learning-rate"]),
    ],
)
def test_mistakes_are_told_once_before_anything_starts(arguments, variables, words):
    done = start(JPEG, *arguments, **variables)
    assert done.returncode == 2 and not done.stdout
    assert all(word in done.stderr for word in words), done.stderr
    assert "Traceback" not in done.stderr


def test_a_python_without_the_package_is_told(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/activate").write_text(f'PATH="{tmp_path}/bin:$PATH"\n')
    (tmp_path / "bin/python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "bin/python").chmod(0o755)
    done = start(JPEG, DATA="x", VENV=str(tmp_path))
    assert done.returncode == 2
    assert f"{tmp_path}/bin/python" in done.stderr and "cannot import megatron_codec" in done.stderr


def test_a_copy_elsewhere_finds_the_project(tmp_path):
    """sbatch runs a copy, in the folder where it was submitted."""
    for script in (JPEG, AVC):
        copy = shutil.copy(ROOT / script, tmp_path / "slurm_script")
        assert "tools/pretrain.py" in printed(str(copy), DATA="x", GPUS_PER_NODE="4")
        done = subprocess.run(["bash", copy], cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "submit from the project's folder" in done.stderr


def test_shellcheck():
    if shutil.which("shellcheck") is None:
        pytest.skip("shellcheck is not installed: apt-get install shellcheck")
    subprocess.run(["shellcheck", "--severity=warning", *map(str, SCRIPTS)], check=True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("quickstart.sh", "pictures"),
        ("pretrain_avclm_tiny.sh", "pictures"),
        ("reproduce_small.sh", "quality"),
    ],
)
def test_ctrl_c_while_it_trains_ends_the_script(tmp_path, arguments):
    """And does not go on with a model that is not trained yet: a training ends well, by itself."""
    for folder in ("examples", "requirements", "pictures", "bin"):
        (tmp_path / folder).mkdir()
    script = shutil.copy(ROOT / "examples" / arguments[0], tmp_path / "examples")
    (tmp_path / "requirements/install.sh").touch()
    (tmp_path / "examples/fashion_mnist.sh").write_text("DATA=data\n")
    python = tmp_path / "bin/python"
    stub = 'echo "$1" >> called\n[ "$1" = tools/pretrain.py ] && trap "" INT && kill -INT 0\nexit 0\n'
    python.write_text(f"#!/bin/bash\n{stub}")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", script, *arguments[1:]],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{python.parent}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        timeout=60,
        start_new_session=True,  # the signal goes to all of it, as a terminal's does
    )
    assert (tmp_path / "called").read_text().splitlines()[-1] == "tools/pretrain.py"
    assert done.returncode == 130, done.stderr
    assert "the same command goes on" in done.stderr
