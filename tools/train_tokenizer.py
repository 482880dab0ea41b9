"""Trains the vocabulary: the bytes, and the merges that shorten the streams of a sample most.

    python tools/train_tokenizer.py --codec jpeg --input photos --vocab-size 320 --num-samples 10000 \\
        --output tokenizer.json
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import run_tool
from megatron_codec.preprocessing import iterate_streams
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class Arguments:
    """Trains a byte-pair vocabulary on codec streams; the settings are those of tools/preprocess_jpeg.py."""

    input: tuple[Path, ...]
    """Folders of pictures (searched recursively), pictures, lists (.txt, a path a line), idx arrays (.gz)."""
    output: Path
    """The tokenizer's file, JSON."""
    codec: Literal["jpeg"] = "jpeg"
    """What the pictures are encoded with."""
    vocab_size: int = 320
    """Bytes and merges; the paper has 320 for JPEG."""
    num_samples: int = 10000
    """At most so many pictures, evenly spread over the input."""
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
    max_token_length: int | None = None
    """The most bytes that a token may stand for; no limit by default."""
    drop_duplicates: bool = False
    """Count equal pictures once."""
    drop_flat: bool = False
    """Leave out pictures of little but one colour: their repetition fills the vocabulary."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    codec = JpegCodec(arguments.image_size, arguments.quality, arguments.remove_head)
    streams = list(
        iterate_streams(
            arguments.input,
            codec,
            geometry=arguments.geometry,
            subset=arguments.subset,
            hold_out=arguments.hold_out,
            limit=arguments.num_samples,
        )
    )
    tokenizer = Tokenizer.train(
        streams,
        arguments.vocab_size,
        codec.to_dict(),
        max_token_length=arguments.max_token_length,
        drop_duplicates=arguments.drop_duplicates,
        drop_flat=arguments.drop_flat,
        progress=True,
    )
    tokenizer.save(arguments.output)
    ids, _ = tokenizer.encode_batch(streams)
    num_bytes = sum(map(len, streams))
    first = ", ".join(tokenizer.token_bytes(256 + i).hex() for i in range(min(8, len(tokenizer.merges))))
    print(
        f"{arguments.output}: {tokenizer.vocab_size} entries from {len(streams):,} pictures; "
        f"{num_bytes / len(streams):.1f} bytes a picture become {len(ids) / len(streams):.1f} tokens "
        f"({num_bytes / len(ids):.3f} bytes a token); first merges: {first}"
    )


if __name__ == "__main__":
    run_tool(main)
