"""Writes a dataset of H.264 tokens for pretraining.

    python tools/preprocess_avc.py --input videos --tokenizer tokenizer.json --output-prefix data/train \\
        --clips-per-video 0 --workers 8

Stopped at any moment, the same command goes on where it was.
"""

from dataclasses import dataclass

import tyro

from megatron_codec.errors import run_tool
from megatron_codec.preprocessing.command import DatasetFlags, write_dataset
from megatron_codec.preprocessing.flags import VideoFlags


@dataclass(frozen=True, kw_only=True)
class Arguments(VideoFlags, DatasetFlags):
    """Turns clips of videos into a dataset of H.264 tokens: PREFIX.bin, PREFIX.idx and PREFIX.json."""


def main() -> None:
    write_dataset(tyro.cli(Arguments, description=Arguments.__doc__))


if __name__ == "__main__":
    run_tool(main)
