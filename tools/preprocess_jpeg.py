"""Writes a dataset of JPEG tokens for pretraining.

    python tools/preprocess_jpeg.py --input photos --tokenizer tokenizer.json --output-prefix data/train \\
        --subset train --hold-out 0.1 --workers 8
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import run_tool
from megatron_codec.preprocessing import build_dataset
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class Arguments:
    """Turns pictures into a dataset of JPEG tokens: PREFIX.bin, PREFIX.idx and PREFIX.json."""

    input: tuple[Path, ...]
    """Folders of pictures (searched recursively), pictures, lists (.txt, a path a line), idx arrays (.gz)."""
    tokenizer: Path
    """The tokenizer's file, trained for the same codec settings."""
    output_prefix: Path
    """Path of the files to write, without an ending."""
    image_size: int = 256
    """Side of the square pictures in pixels, a multiple of 16."""
    quality: int = 25
    """JPEG quality, 1 to 100."""
    remove_head: bool = False
    """Leave out the constant head of every stream as well; worth it for small pictures."""
    geometry: Literal["crop", "pad"] = "crop"
    """crop: resize the largest centred square. pad: shrink to fit, never enlarge, centre on black."""
    subset: Literal["all", "train", "test"] = "all"
    """Which pictures: all, all but the held-out ones, or the held-out ones."""
    hold_out: float = 0.0
    """Share of the pictures held out for the subset "test"; a hash of the picture's name decides."""
    limit: int | None = None
    """At most so many pictures, evenly spread over the input."""
    workers: int = 1
    """Processes; each writes its own shard, and the documents are the same for any number."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    manifest = build_dataset(
        arguments.output_prefix,
        arguments.input,
        JpegCodec(arguments.image_size, arguments.quality, arguments.remove_head),
        Tokenizer.load(arguments.tokenizer),
        geometry=arguments.geometry,
        subset=arguments.subset,
        hold_out=arguments.hold_out,
        limit=arguments.limit,
        workers=arguments.workers,
        command=sys.argv,
    )
    print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens "
        f"({manifest.tokens / manifest.documents:.1f} a document)"
    )
    if manifest.skipped:
        print(f"skipped {len(manifest.skipped):,} pictures: see {arguments.output_prefix}.json")


if __name__ == "__main__":
    run_tool(main)
