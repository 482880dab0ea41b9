"""The command line of tools/pretrain.py: every fault of it in one message."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Literal, get_args, get_origin

import numpy as np
import pytest

from megatron_codec.data import write_dataset
from megatron_codec.errors import UserError, UserErrors
from megatron_codec.flags import parse, parse_dry_run, parse_pretrain
from megatron_codec.flags.command_line import flags_of, known_flags, scan
from megatron_codec.flags.dry_run import DryRunFlags
from megatron_codec.flags.megatron import MEGATRON_FLAGS, megatron_flag
from megatron_codec.flags.page import page

ROOT = Path(__file__).resolve().parents[2]
REAL = {"--preset", *known_flags(), *flags_of(DryRunFlags)}


def start(arguments: str, **variables: str) -> subprocess.CompletedProcess:
    """Runs the tool as a user does, and lets it say in its last line what it imported."""
    code = (
        "import atexit, runpy, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "sys.argv[0] = 'tools/pretrain.py'\n"
        "runpy.run_path('tools/pretrain.py', run_name='__main__')"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return subprocess.run(
        [sys.executable, "-c", code, *shlex.split(arguments)],
        cwd=ROOT,
        env=clean | variables,
        capture_output=True,
        text=True,
    )


def faults_of(arguments: str) -> list[str]:
    """Faults that reading the command line tells."""
    try:
        parse(shlex.split(arguments))
    except UserErrors as several:
        return [str(fault) for fault in several.faults]
    except UserError as fault:
        return [str(fault)]
    return []


def test_all_faults_come_in_one_message_and_none_follows_from_another():
    done = start(
        "--num-layers many --tensor-model-paralel-size 3 --lr-decay-style cosin --lr -1 --fp16 --dat-path x"
    )
    assert done.returncode == 2 and not done.stdout
    for part in (
        "--num-layers many: must be a whole number",
        "did you mean --tensor-model-parallel-size",
        "did you mean cosine?",
        "--lr -1",
        "use --bf16",
        "did you mean --data-path",
    ):
        assert part in done.stderr
    *faults, torch_is_there = done.stderr.splitlines()
    assert len(faults) == 6 and all(fault.startswith("error: ") for fault in faults)
    assert torch_is_there == "False"


@pytest.mark.parametrize("flag", [flag for flag, kind in known_flags().items() if "Literal" in str(kind)])
def test_every_choice_is_taken_and_another_is_refused(flag):
    kind = known_flags()[flag]
    literal = next(option for option in (kind, *get_args(kind)) if get_origin(option) is Literal)
    for choice in get_args(literal):
        assert scan([flag, choice], known_flags()).faults == []
    assert "must be one of" in str(scan([flag, "nonsense"], known_flags()).faults[0])


# Right for 1 process (8 in the dry runs), and each leans on most of its flags.
RIGHT = [
    "--mock-data --micro-batch-size 3 --global-batch-size 6 --train-iters 5000 --lr-warmup-iters 2000",
    "--mock-data --num-layers 48 --recompute-granularity full --recompute-method uniform "
    "--recompute-num-layers 48",
    "--mock-data --lr-decay-iters 2000 --train-iters 3000 --lr-warmup-iters 1500 --profile-steps 2500 2600 "
    "--save runs/x --save-interval 20",
    "--mock-data --lr 1e-5 --min-lr 1e-6 --lr-decay-style WSD --lr-wsd-decay-iters 100 --seq-length 2048",
    "--mock-data --hidden-size 48 --num-attention-heads 12 --ffn-hidden-size 96 --wandb-project x "
    "--wandb-exp-name y",
    "--dry-run --world-size 8 --tensor-model-parallel-size 2 --pipeline-model-parallel-size 2 "
    "--num-layers 24 --num-virtual-stages-per-pipeline-rank 3 --global-batch-size 8 "
    "--micro-batch-size 2 --mfu 0.3 --recompute-granularity full --recompute-num-layers 4 "
    "--sequence-parallel",
    "--dry-run --world-size 8 --context-parallel-size 2 --global-batch-size 16 --micro-batch-size 4 "
    "--overlap-grad-reduce --overlap-param-gather",
]  # fmt: skip


@pytest.mark.parametrize("arguments", RIGHT)
def test_breaking_one_flag_of_a_right_command_line_gives_one_fault(arguments):
    config, planned = parse_pretrain(arguments.split()), parse_dry_run(arguments.split())
    assert [*(config.faults(1) if planned is None else config.run_faults(planned.world_size))] == []
    for flag in re.findall(r"--[a-z0-9-]+", arguments):
        misspelt = (
            arguments.replace(f"{flag} ", f"{flag[:-1]}{flag[-1] * 2} ", 1) if flag in arguments else ""
        )
        if f"{flag} " in arguments:
            told = faults_of(misspelt)
            assert len(told) == 1 and "did you mean" in told[0], (misspelt, told)
        value = re.search(rf"{flag} ([0-9.e-]+)(?: |$)", arguments)
        if value:
            broken = arguments.replace(f"{flag} {value[1]}", f"{flag} {value[1]}x", 1)
            told = faults_of(broken)
            assert len(told) == 1 and "must be a" in told[0], (broken, told)


def test_what_is_wrong_with_other_values_is_told_beside_a_faulty_flag():
    told = faults_of("--mock-data --lrr 1 --num-attention-heads 7 --train-iters 0")
    assert len(told) == 3 and any("--hidden-size 4096" in fault for fault in told)
    told = faults_of("--mock-data --lrr 1 --global-batch-size 5 --micro-batch-size 2 --eval-interval 0")
    assert len(told) == 3


def test_a_dry_run_is_judged_in_the_same_message():
    done = start(
        "--dry-run --world-size many --gpu a10 --mfu 2 --vocab-size 10 --tensor-model-parallel-size 3"
    )
    assert done.returncode == 2 and not done.stdout and done.stderr.endswith("False\n")
    for part in (
        "--world-size many",
        "--gpu a10",
        "--mfu 2",
        "--vocab-size 10",
        "must divide --num-attention",
    ):
        assert part in done.stderr
    assert "processes" not in done.stderr and "--data-path" not in done.stderr
    assert faults_of("--mock-data --mfu 0.5 --gpu h") == [
        f"{flag}: goes with --dry-run; add --dry-run, or leave it out" for flag in ("--mfu", "--gpu")
    ]
    assert parse_dry_run(["--no-dry-run"]) is None


@pytest.mark.parametrize("wrong", ["--preset huge", "--preset", "--prest jpeglm-7b"])
def test_without_its_preset_a_command_line_is_read_and_not_judged(wrong):
    told = faults_of(f"--num-layers 0 --learning x {wrong} --lr y")
    assert len(told) == 3 and any("--lr y" in fault for fault in told)
    assert any(wrong in fault for fault in told) and not any("--num-layers" in fault for fault in told)


def write(prefix: Path, tokenizer: str) -> Path:
    document = np.array([256, 1, 2, 257], np.uint16)
    write_dataset(prefix, [document], {"name": "jpeg", "settings": {}}, {"hash": tokenizer})
    return prefix


def test_datasets_are_told_beside_a_faulty_flag(tmp_path):
    one, other = write(tmp_path / "one", "a"), write(tmp_path / "other", "b")
    paths = (
        f"--train-data-path {one} {tmp_path}/nix --valid-data-path {other} --test-data-path {tmp_path}/nor"
    )
    told = faults_of(f"--lr x {paths}")
    assert len(told) == 4
    for part in (
        "nix.json: there is no such",
        "nor.json: there is no such",
        f"{other}: was made with another",
    ):
        assert any(part in fault for fault in told), part
    # Where it is not known which training data were meant, nothing is said of any.
    assert len(faults_of(f"--train-data-pat {one} --valid-data-path {one}")) == 1


def test_the_table_and_the_flags_are_disjoint():
    assert len(MEGATRON_FLAGS) > 200
    assert not [flag for flag in REAL if megatron_flag(flag)]


@pytest.mark.parametrize("name", MEGATRON_FLAGS)
def test_a_flag_of_megatron_takes_as_many_values_as_there(name):
    entry, flag = MEGATRON_FLAGS[name], name.replace("*", "x")
    accepted = next(iter(entry.same), "" if entry.takes == "none" else "1")
    values = accepted.split()
    right = scan([flag, *values], known_flags())
    assert bool(right.unchanged) == bool(entry.same)
    assert len(right.faults) == (not entry.same)
    more = [str(fault) for fault in scan([flag, *values, "stray"], known_flags()).faults]
    assert len(more) == len(right.faults) + (entry.takes != "several")
    if entry.takes != "several":
        assert more[-1].startswith(f"stray: follows {flag}, which takes")
    if entry.takes == "one" and entry.same:
        assert "takes exactly one value" in str(scan([flag], known_flags()).faults[0])
        assert "is not supported, only" in str(scan([flag, "nonsense"], known_flags()).faults[0])


def test_what_is_offered_instead_of_a_flag_of_megatron_exists():
    for entry in MEGATRON_FLAGS.values():
        for flag in re.findall(r"(?<!sbatch )--[a-z][a-z0-9-]*", entry.remedy):
            assert flag in REAL or flag == "--tokenizer", entry


def test_a_flag_of_megatron_is_accepted_only_with_the_value_that_is_so_anyway():
    command = parse(["--swiglu", "--attention-dropout", "0", "--num_layers=4"])
    assert command.unchanged == ("--swiglu", "--attention-dropout 0")
    with pytest.raises(UserError, match=r"--attention-dropout 0\.1: is not supported, only 0"):
        parse_pretrain(["--attention-dropout", "0.1", "--mock-data"])


def test_what_changed_nothing_is_said_by_the_first_process_alone(capsys):
    arguments = "--dry-run --world-size 1 --swiglu --attention-backend flash --override-opt_param-scheduler"
    first, second = (start(arguments, RANK=rank) for rank in "01")
    said = "--swiglu --attention-backend flash --override-opt_param-scheduler"
    assert first.returncode == second.returncode == 0
    assert first.stderr == f" always so here, changed nothing: {said}\nFalse\n"
    assert second.stderr == "False\n"
    parse_pretrain(["--swiglu"])  # as the job script does, before it starts them
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("arguments", (["--num-layer", "4"], ["--num-layers"], ["--bf16", "yes"], ["stray"]))
def test_abbreviations_missing_and_superfluous_values_are_refused(arguments):
    with pytest.raises(UserError):
        parse_pretrain([*arguments, "--mock-data"])


def test_the_page_of_megatron_flags_is_up_to_date():
    written = (ROOT / "docs/megatron_flags.md").read_text()
    assert written == page(), "python -m megatron_codec.flags.page > docs/megatron_flags.md"
