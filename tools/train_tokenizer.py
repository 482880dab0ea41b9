"""Trains a byte-pair encoding on the codec streams of pictures.

    python tools/train_tokenizer.py --codec jpeg --input photos --vocab-size 320 --num-samples 10000 \\
        --output tokenizer.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError, run_tool
from megatron_codec.preprocessing import iterate_streams
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class Arguments:
    """Trains a byte-pair encoding on the codec streams of pictures, and writes it to one JSON file."""

    input: tuple[Path, ...]
    """Folders of pictures (searched recursively), pictures, lists (.txt, a path a line), idx arrays (.gz)."""
    output: Path
    """The file to write."""
    codec: Literal["jpeg"] = "jpeg"
    """Name of the codec."""
    vocab_size: int = 320
    """Entries: 256 bytes and the merges. BOS and EOS come on top."""
    num_samples: int = 10000
    """Train on at most so many pictures, evenly spread over the input."""
    max_token_length: int | None = None
    """The most bytes that one token may stand for."""
    drop_duplicates: bool = False
    """Count equal streams once."""
    drop_flat: bool = False
    """Leave out streams that are little but repetition, such as single-colour pictures."""
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


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output}", "is a folder", "name the file to write")
    codec = JpegCodec(arguments.image_size, arguments.quality, arguments.remove_head)
    streams = iterate_streams(
        arguments.input,
        codec,
        geometry=arguments.geometry,
        subset=arguments.subset,
        hold_out=arguments.hold_out,
        limit=arguments.num_samples,
    )
    tokenizer = Tokenizer.train(
        streams,
        arguments.vocab_size,
        codec=codec.to_dict(),
        max_token_length=arguments.max_token_length,
        drop_duplicates=arguments.drop_duplicates,
        drop_flat=arguments.drop_flat,
        progress=True,
    )
    if tokenizer.vocab_size < arguments.vocab_size:
        raise UserError(
            f"--vocab-size {arguments.vocab_size}",
            f"cannot be reached: after {tokenizer.vocab_size} entries no pair is left",
            "give more pictures, or ask for fewer entries",
        )
    tokenizer.save(arguments.output)
    corpus = tokenizer.trained_on or {}
    print(
        f"{corpus['documents']:,} documents, {corpus['bytes']:,} bytes in {corpus['tokens']:,} tokens: "
        f"{corpus['bytes'] / corpus['tokens']:.3f} bytes a token"
    )
    first = range(256, min(tokenizer.vocab_size, 256 + 16))
    print("first merges:", " ".join(tokenizer.token_bytes(token).hex() for token in first))


if __name__ == "__main__":
    run_tool(main)
