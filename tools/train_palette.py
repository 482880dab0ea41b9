"""Finds the colours of a pixel model, and writes the tokenizer in which each of them is one token.

python tools/train_palette.py --input photos --image-size 32 --num-colors 512 --output tokenizer.json
python tools/preprocess_images.py --input photos --tokenizer tokenizer.json --output-prefix data/train
"""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import tyro

from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.pixels import PixelsCodec, nearest, palette_text
from megatron_codec.errors import UserError, run_tool
from megatron_codec.preprocessing import iterate_streams
from megatron_codec.preprocessing.flags import PictureInputFlags
from megatron_codec.preprocessing.palette import RawPixels, cluster, count_colours
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class Arguments(PictureInputFlags):
    """Finds the colours of a pixel model by k-means over the pixels of pictures, and writes its tokenizer."""

    output: Path
    """The tokenizer's file to write; it holds the codec with the colours."""
    image_size: int = 32
    """Side of the square pictures in pixels."""
    num_colors: int = 512
    """Colours of the palette at most; fewer where the pictures have no more."""
    num_samples: int = 10000
    """Look at so many pictures at most, evenly spread over the input."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output}", "is a folder", "name the file to write")
    if arguments.image_size < 1:
        raise UserError(f"--image-size {arguments.image_size}", "must be at least 1")
    streams = iterate_streams(
        arguments.input,
        arguments.encoder_of(cast(ImageCodec, RawPixels(arguments.image_size))),
        subset=arguments.subset,
        hold_out=arguments.hold_out,
        limit=arguments.num_samples,
    )
    different, counts = count_colours(streams)
    palette = cluster(different, counts, arguments.num_colors, arguments.seed)
    codec = PixelsCodec(arguments.image_size, palette_text(palette))
    Tokenizer(codec.merges, codec.to_dict()).save(arguments.output)
    error = ((different.astype(float) - palette[nearest(different, palette)]) ** 2).mean(axis=1)
    error = (error * counts).sum() / counts.sum()
    print(
        f"{len(palette):,} colours for {len(different):,} different ones in {counts.sum():,} pixels; "
        f"root mean square error {error**0.5:.2f} of 255"
    )


if __name__ == "__main__":
    run_tool(main)
