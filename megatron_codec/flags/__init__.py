"""The command line of pretraining: Megatron's flag names, built by tyro from the dataclasses of config/."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

import tyro

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError, collecting, raise_all
from megatron_codec.flags.command_line import Scan, flags_of, known_flags, scan
from megatron_codec.flags.dry_run import DryRun, DryRunFlags
from megatron_codec.flags.value_faults import value_faults
from megatron_codec.presets import PRESETS, preset

__all__ = ["CommandLine", "DryRun", "parse", "parse_dry_run", "parse_pretrain"]

_DRY_RUN = flags_of(DryRunFlags)


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for.

    Attributes:
        config: the run.
        dry_run: where it is only to be computed, else None.
        unchanged: flags of Megatron-LM that ask for what happens anyway, with their values.
    """

    config: PretrainConfig
    dry_run: DryRun | None
    unchanged: tuple[str, ...]


@dataclass(frozen=True)
class _Flags:
    """All that tyro reads."""

    config: Annotated[PretrainConfig, tyro.conf.arg(name="")]
    dry_run: Annotated[DryRunFlags, tyro.conf.arg(name="")] = field(default_factory=DryRunFlags)
    preset: str | None = None
    """Named defaults, which the other flags replace."""


def parse(arguments: Sequence[str] | None = None, world_size: int | None = None) -> CommandLine:
    """Reads flags over the defaults of `--preset NAME`. Prints nothing and imports no torch.

    Where a flag is wrong, what is wrong with the other values, and with the datasets, is told with it, for
    `world_size` processes: by default WORLD_SIZE of the environment, which torchrun sets, else 1. SLURM's
    number of tasks is not asked: under examples/ a task is one torchrun. A right command line is not judged
    here but by `PretrainConfig.faults`, `estimate.dry_run` and `training.pretrain`.

    Raises:
        UserError: flags that are not known, values of a wrong type, an unknown preset, flags of a dry run
            without --dry-run, and what is wrong beside them.
        SystemExit: `--help`.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    scanned = scan(arguments, {"--preset": str, **known_flags(), **_DRY_RUN})
    name = _last_value(scanned.good, "--preset")
    defaults = PretrainConfig()
    before = len(scanned.faults)
    with collecting(scanned.faults):
        defaults = preset(name) if name else defaults
    if len(scanned.faults) > before:
        scanned.touched.add("--preset")
    flags = _read(scanned.good, defaults)
    scanned.faults += _without_dry_run(scanned, flags.dry_run)
    planned = None
    if flags.dry_run.dry_run or "--dry-run" in scanned.touched:
        planned = DryRun.of(flags.dry_run, flags.config)
    if scanned.faults:
        if "--preset" not in scanned.touched:  # without it nothing true can be said of the values
            if planned is not None:
                world_size = planned.world_size
            elif world_size is None:
                world_size = int(os.environ.get("WORLD_SIZE", "1"))
            scanned.faults += value_faults(flags.config, world_size, scanned.touched, planned)
        raise_all(scanned.faults)
    return CommandLine(flags.config, planned, tuple(scanned.unchanged))


def parse_pretrain(arguments: Sequence[str] | None = None, world_size: int | None = None) -> PretrainConfig:
    """The run of a command line; see `parse`."""
    return parse(arguments, world_size).config


def parse_dry_run(arguments: Sequence[str] | None = None) -> DryRun | None:
    """The dry run of a command line, None where it is not asked for; see `parse`."""
    return parse(arguments).dry_run


def _read(arguments: Sequence[str], defaults: PretrainConfig) -> _Flags:
    return tyro.cli(
        _Flags,
        default=_Flags(defaults),
        args=arguments,
        description=(
            f"Pretrains a codec language model. --preset {{{','.join(PRESETS)}}} sets the defaults that the "
            "other flags replace; they have Megatron's names. Start under torchrun for more than one "
            "process. --dry-run prints the memory, speed and time that a run would take, and ends: with "
            "--world-size N GPUs, --gpu NAME, --mfu 0.4 and --vocab-size 320; it needs no data."
        ),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def _last_value(good: Sequence[str], flag: str) -> str | None:
    places = [place for place, argument in enumerate(good) if argument == flag]
    return good[places[-1] + 1] if places else None


def _without_dry_run(scanned: Scan, flags: DryRunFlags) -> list[UserError]:
    if flags.dry_run or "--dry-run" in scanned.touched:
        return []
    return [
        UserError(flag, "goes with --dry-run", "add --dry-run, or leave it out")
        for flag in dict.fromkeys(scanned.given)
        if flag in _DRY_RUN and flag != "--no-dry-run"
    ]
