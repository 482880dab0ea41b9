"""Writes a dataset of pictures for pretraining, with the codec that a tokenizer was made for.

    python tools/preprocess_images.py --input photos --tokenizer tokenizer.json --output-prefix data/train \\
        --subset train --hold-out 0.1 --workers 8

For codecs that have no tool of their own, such as pixels and those of other packages. Stopped at any moment,
the same command goes on where it was.
"""

from dataclasses import dataclass

import tyro

from megatron_codec.errors import run_tool
from megatron_codec.preprocessing import PictureEncoder
from megatron_codec.preprocessing.command import DatasetFlags, write_dataset
from megatron_codec.preprocessing.flags import PictureInputFlags, picture_codec


@dataclass(frozen=True, kw_only=True)
class Arguments(PictureInputFlags, DatasetFlags):
    """Turns pictures into a dataset by the codec of a tokenizer: PREFIX.bin, PREFIX.idx and PREFIX.json."""

    def encoder(self) -> PictureEncoder:
        """See `InputFlags`."""
        return self.encoder_of(picture_codec("--tokenizer", self.tokenizer))


def main() -> None:
    write_dataset(tyro.cli(Arguments, description=Arguments.__doc__))


if __name__ == "__main__":
    run_tool(main)
