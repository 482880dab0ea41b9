"""The command line of pretraining: Megatron's flag names, built by tyro from the dataclasses of config.py."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import raise_all
from megatron_codec.flags.command_line import scan, true_faults
from megatron_codec.presets import PRESETS, preset

DRY_RUN_FLAGS = ("--dry-run", "--world-size", "--gpu", "--mfu", "--vocab-size")


@dataclass(frozen=True)
class DryRun:
    """A run that is only computed.

    Attributes:
        config: the run; data and folders may be left out.
        world_size: number of GPUs.
        vocab_size: bytes and merges of the tokenizer that there will be.
        mfu: utilization that speeds are computed for.
        gpu_name: the kind of GPU; None for every known one.
    """

    config: PretrainConfig
    world_size: int
    vocab_size: int
    mfu: float
    gpu_name: str | None


def parse_pretrain(
    arguments: Sequence[str] | None = None, world_size: int | None = None, dry_run: bool = False
) -> PretrainConfig:
    """Reads flags over the defaults of `--preset NAME`.

    Where a flag is wrong, the faults of the other values for `world_size` processes (by default
    WORLD_SIZE of the environment, else 1) are told with it.

    Raises:
        UserError: flags that are not known, values of a wrong type, and what is wrong beside them.
        SystemExit: `--help`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    known, rest = first.parse_known_args(arguments)
    defaults = preset(known.preset) if known.preset else PretrainConfig()
    scanned = scan(rest, ("--preset", *DRY_RUN_FLAGS))
    config = _read(scanned.good, defaults)
    if scanned.faults:
        # Without the preset that was meant, or a number of GPUs, nothing true can be said of the values.
        if not dry_run and "--preset" not in scanned.touched:
            if world_size is None:
                world_size = int(os.environ.get("WORLD_SIZE", 1))
            scanned.faults += true_faults(config, world_size, scanned.touched)
        raise_all(scanned.faults)
    if scanned.unchanged:
        print(f" always so here, changed nothing: {' '.join(scanned.unchanged)}", file=sys.stderr)
    return config


def _read(arguments: Sequence[str], defaults: PretrainConfig) -> PretrainConfig:
    return tyro.cli(
        Annotated[PretrainConfig, tyro.conf.arg(name="")],
        default=defaults,
        args=arguments,
        description=(
            f"Pretrains a codec language model. --preset {{{','.join(PRESETS)}}} sets the defaults that the "
            "other flags replace; they have Megatron's names. Start under torchrun for more than one "
            "process. --dry-run prints the memory, speed and time that a run would take, and ends: with "
            "--world-size N GPUs, --gpu NAME, --mfu 0.4 and --vocab-size 320; it needs no data."
        ),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )


def parse_dry_run(arguments: Sequence[str] | None = None) -> DryRun | None:
    """Reads the flags of `--dry-run` beside those of the run; None where it is not asked for.

    The number of GPUs is `--world-size`, else WORLD_SIZE of the environment, else TP x PP x CP.

    Raises:
        UserError: the preset is not known.
        SystemExit: as of `parse_pretrain`.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--dry-run" not in arguments:
        return None
    first = argparse.ArgumentParser(
        add_help=False, allow_abbrev=False, usage="pretrain.py --dry-run [flags]; see --help"
    )
    first.add_argument("--dry-run", action="store_true")
    first.add_argument("--world-size", type=int)
    first.add_argument("--gpu")
    first.add_argument("--mfu", type=float, default=0.4)
    first.add_argument("--vocab-size", type=int, default=320)
    known, rest = first.parse_known_args(arguments)
    config = parse_pretrain(rest, dry_run=True)
    world_size = known.world_size
    if world_size is None:
        world_size = int(os.environ.get("WORLD_SIZE", max(1, config.parallel.model_parallel_size)))
    return DryRun(config, world_size, known.vocab_size, known.mfu, known.gpu)
