"""Writes a dataset of JPEG tokens for pretraining.

    python tools/preprocess_jpeg.py --input photos --tokenizer tokenizer.json --output-prefix data/train \\
        --subset train --hold-out 0.1 --workers 8

Stopped at any moment, the same command goes on where it was.
"""

from dataclasses import dataclass

import tyro

from megatron_codec.errors import run_tool
from megatron_codec.preprocessing.command import DatasetFlags, write_dataset
from megatron_codec.preprocessing.flags import PictureFlags


@dataclass(frozen=True, kw_only=True)
class Arguments(PictureFlags, DatasetFlags):
    """Turns pictures into a dataset of JPEG tokens: PREFIX.bin, PREFIX.idx and PREFIX.json."""


def main() -> None:
    write_dataset(tyro.cli(Arguments, description=Arguments.__doc__))


if __name__ == "__main__":
    run_tool(main)
