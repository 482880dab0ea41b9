"""The command line of tools/pretrain.py: every fault of it in one message."""

import subprocess
import sys
from typing import Literal, get_args, get_origin

import pytest

from megatron_codec.errors import UserError
from megatron_codec.flags import parse, parse_pretrain
from megatron_codec.flags.command_line import known_flags, scan
from megatron_codec.flags.megatron import MEGATRON_FLAGS


def test_all_faults_come_in_one_message_and_none_follows_from_another():
    arguments = "--num-layers many --tensor-model-paralel-size 3 --lr-decay-style cosin --lr -1 --fp16"
    done = subprocess.run(
        [sys.executable, "tools/pretrain.py", *arguments.split(), "--dat-path", "x"],
        capture_output=True,
        text=True,
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
    assert "not given" not in done.stderr


@pytest.mark.parametrize("flag", [flag for flag, kind in known_flags().items() if "Literal" in str(kind)])
def test_every_choice_is_taken_and_another_is_refused(flag):
    kind = known_flags()[flag]
    literal = next(option for option in (kind, *get_args(kind)) if get_origin(option) is Literal)
    for choice in get_args(literal):
        assert scan([flag, choice], known_flags()).faults == []
    assert "must be one of" in str(scan([flag, "nonsense"], known_flags()).faults[0])


def test_the_table_and_the_flags_are_disjoint():
    assert not set(MEGATRON_FLAGS) & set(known_flags())


def test_a_flag_of_megatron_is_accepted_only_with_the_value_that_is_so_anyway():
    command = parse(["--swiglu", "--attention-dropout", "0", "--num_layers=4"])
    assert command.unchanged == ("--swiglu", "--attention-dropout 0")
    with pytest.raises(UserError, match=r"--attention-dropout 0\.1: is not supported, only 0"):
        parse_pretrain(["--attention-dropout", "0.1", "--mock-data"])


@pytest.mark.parametrize("arguments", (["--num-layer", "4"], ["--num-layers"], ["--bf16", "yes"], ["stray"]))
def test_abbreviations_missing_and_superfluous_values_are_refused(arguments):
    with pytest.raises(UserError):
        parse_pretrain([*arguments, "--mock-data"])
