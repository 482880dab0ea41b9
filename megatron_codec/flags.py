"""The command line of pretraining: Megatron's flag names, built by tyro from the dataclasses of config.py."""

import argparse
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from megatron_codec.config import PretrainConfig
from megatron_codec.presets import PRESETS, preset


def parse_pretrain(arguments: Sequence[str] | None = None) -> PretrainConfig:
    """Reads flags over the defaults of `--preset NAME`.

    Raises:
        UserError: the preset is not known.
        SystemExit: `--help`, or a flag that is not known or has no such value; tyro explains it.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--preset")
    known, rest = first.parse_known_args(arguments)
    defaults = preset(known.preset) if known.preset else PretrainConfig()
    return tyro.cli(
        Annotated[PretrainConfig, tyro.conf.arg(name="")],
        default=defaults,
        args=rest,
        description=(
            f"Pretrains a codec language model. --preset {{{','.join(PRESETS)}}} sets the defaults that the "
            "other flags replace; they have Megatron's names. Start under torchrun for more than one process."
        ),
        config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
    )
