"""Trains a byte-pair encoding on the codec streams of pictures or clips.

    python tools/train_tokenizer.py --codec jpeg --input photos --vocab-size 320 --num-samples 10000 \\
        --output tokenizer.json
    python tools/train_tokenizer.py --codec avc --input videos --vocab-size 1024 --output tokenizer.json
    python tools/train_tokenizer.py --codec avc --help        # the flags of clips
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Literal

import tyro

from megatron_codec.errors import UserError, run_tool
from megatron_codec.preprocessing import iterate_streams
from megatron_codec.preprocessing.flags import InputFlags, PictureFlags, VideoFlags
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(InputFlags):
    """How a tokenizer is trained, and where it is written."""

    output: Path
    """The file to write."""
    vocab_size: int = 320
    """Entries: 256 bytes and the merges. BOS and EOS come on top."""
    num_samples: int = 10000
    """Train on at most so many pictures or videos, evenly spread over the input."""
    max_token_length: int | None = None
    """The most bytes that one token may stand for."""
    drop_duplicates: bool = False
    """Count equal streams once."""
    drop_flat: bool = False
    """Leave out streams that are little but repetition, such as single-colour pictures."""


@dataclass(frozen=True, kw_only=True)
class PictureArguments(PictureFlags, TrainingFlags):
    """Trains a byte-pair encoding on the codec streams of pictures, and writes it to one JSON file."""

    codec: Literal["jpeg", "avc"] = "jpeg"
    """jpeg for pictures, avc for clips; "--codec avc --help" shows the flags of clips."""


@dataclass(frozen=True, kw_only=True)
class ClipArguments(VideoFlags, TrainingFlags):
    """Trains a byte-pair encoding on the codec streams of clips, and writes it to one JSON file."""

    codec: Literal["jpeg", "avc"] = "avc"
    """jpeg for pictures, avc for clips."""
    vocab_size: int = 1024
    """Entries: 256 bytes and the merges. BOS and EOS come on top."""


def main() -> None:
    kind = ClipArguments if codec_of(sys.argv[1:]) == "avc" else PictureArguments
    arguments = tyro.cli(kind, description=kind.__doc__)
    if arguments.output.is_dir():
        raise UserError(f"--output {arguments.output}", "is a folder", "name the file to write")
    encoder = arguments.encoder()
    streams = iterate_streams(
        arguments.input,
        encoder,
        subset=arguments.subset,
        hold_out=arguments.hold_out,
        limit=arguments.num_samples,
    )
    tokenizer = Tokenizer.train(
        streams,
        arguments.vocab_size,
        codec=encoder.codec.to_dict(),
        max_token_length=arguments.max_token_length,
        drop_duplicates=arguments.drop_duplicates,
        drop_flat=arguments.drop_flat,
        progress=True,
    )
    if tokenizer.vocab_size < arguments.vocab_size:
        raise UserError(
            f"--vocab-size {arguments.vocab_size}",
            f"cannot be reached: after {tokenizer.vocab_size} entries no pair is left",
            f"give more {encoder.things}, or ask for fewer entries",
        )
    tokenizer.save(arguments.output)
    corpus = tokenizer.trained_on or {}
    print(
        f"{corpus['documents']:,} documents, {corpus['bytes']:,} bytes in {corpus['tokens']:,} tokens: "
        f"{corpus['bytes'] / corpus['tokens']:.3f} bytes a token"
    )
    first = range(256, min(tokenizer.vocab_size, 256 + 16))
    print("first merges:", " ".join(tokenizer.token_bytes(token).hex() for token in first))


def codec_of(command: Sequence[str]) -> str:
    """The value of --codec, which decides what other flags there are; empty without it."""
    values = [value for flag, value in pairwise([*command, ""]) if flag == "--codec"]
    values += [argument.removeprefix("--codec=") for argument in command if argument.startswith("--codec=")]
    return values[-1] if values else ""


if __name__ == "__main__":
    run_tool(main)
