"""What tools/preprocess_jpeg.py and tools/preprocess_avc.py do: their flags of the dataset, and the run."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_codec.errors import UserError
from megatron_codec.preprocessing.build import build_dataset
from megatron_codec.preprocessing.flags import InputFlags
from megatron_codec.preprocessing.skipping import SkipLimit
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True, kw_only=True)
class DatasetFlags(InputFlags):
    """What is written, and by how many processes."""

    tokenizer: Path
    """The tokenizer's file, trained for the same codec settings."""
    output_prefix: Path
    """Path of the files to write, without an ending."""
    limit: int | None = None
    """At most so many pictures or videos, evenly spread over the input."""
    workers: int = 1
    """Processes; each writes its own shard, and the documents are the same for any number."""
    shard: str = "0/1"
    """I/N: do the I-th of N parts alone, I from 0, for the tasks of a SLURM array; the last one to end
    joins them."""
    max_skipped: str | None = None
    """Stop when more of them cannot be read: a number, or a share such as 1%."""


def write_dataset(arguments: DatasetFlags) -> None:
    """Writes the dataset that the flags describe, and says what it has become."""
    limit = None if arguments.max_skipped is None else SkipLimit(arguments.max_skipped)
    prefix, encoder = arguments.output_prefix, arguments.encoder()
    manifest = build_dataset(
        prefix,
        arguments.input,
        encoder,
        Tokenizer.load(arguments.tokenizer),
        subset=arguments.subset,
        hold_out=arguments.hold_out,
        limit=arguments.limit,
        workers=arguments.workers,
        task=parse_shard(arguments.shard),
        max_skipped=limit,
        command=without_shard(sys.argv),
    )
    if manifest is None:
        print(f"shard {arguments.shard} is done; the task that ends last writes {prefix}.json")
        return
    tokens, duplicates = manifest.statistics["tokens_per_document"], manifest.statistics["duplicates"]
    print(
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens ({tokens['mean']:.1f} a document, "
        f"half of them {tokens['p25']:,} to {tokens['p75']:,}), {duplicates['count']:,} exact duplicates"
    )
    if manifest.skipped["count"]:
        reasons = ", ".join(f"{kind}: {count:,}" for kind, count in manifest.skipped["reasons"].items())
        print(f"skipped {manifest.skipped['count']:,} {encoder.things} ({reasons}): see {prefix}.json")


def parse_shard(text: str) -> tuple[int, int]:
    """(I, N) of "I/N"."""
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal()):
        raise UserError(f"--shard {text}", "must be I/N with I from 0 to N - 1", "for instance 0/64")
    return int(number), int(count)


def without_shard(command: Sequence[str]) -> list[str]:
    """The command line that all tasks have in common."""
    kept = list(command)
    if "--shard" in kept:
        place = kept.index("--shard")
        del kept[place : place + 2]
    return [argument for argument in kept if not argument.startswith("--shard=")]
