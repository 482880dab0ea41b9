"""Which bytes to merge: the training loop around the C++ trainer (csrc/bpe_trainer.hpp)."""

import hashlib
import zlib
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

from megatron_codec._csrc import BpeTrainer
from megatron_codec.errors import UserError
from megatron_codec.tokenizer.vocabulary import MAX_VOCAB_SIZE, NUM_BYTES, Merge

# 10,000 crops of photographs at 256 pixels stay above 0.52, single colours and gradients below 0.08.
FLAT_RATIO = 1 / 3
UNBOUNDED = 1 << 32


def is_flat(stream: bytes) -> bool:
    """Whether zlib shrinks a codec stream, which is compressed already, to a third: little but repetition."""
    return len(zlib.compress(stream, 1)) < FLAT_RATIO * len(stream)


def train_merges(
    streams: Iterable[bytes],
    vocab_size: int,
    max_token_length: int | None = None,
    drop_duplicates: bool = False,
    drop_flat: bool = False,
    progress: bool = False,
) -> tuple[list[Merge], dict[str, Any]]:
    """The merges, and a record of what they were trained on. For the arguments see `Tokenizer.train`."""
    if not NUM_BYTES <= vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size {vocab_size}", f"must lie between {NUM_BYTES} and {MAX_VOCAB_SIZE}")
    if max_token_length is not None and max_token_length < 2:
        raise UserError(
            f"--max-token-length {max_token_length}", "must be at least 2, or nothing can be merged"
        )

    trainer = BpeTrainer(max_token_length or UNBOUNDED)
    corpus = hashlib.sha256()
    seen: set[bytes] = set()
    record: dict[str, Any] = {"sha256": "", "documents": 0, "bytes": 0, "tokens": 0}
    record |= {"duplicates_dropped": 0, "flat_dropped": 0, "max_token_length": max_token_length}
    for stream in streams:
        digest = hashlib.sha256(stream).digest()
        if drop_duplicates and digest in seen:
            record["duplicates_dropped"] += 1
        elif drop_flat and is_flat(stream):
            record["flat_dropped"] += 1
        else:
            trainer.add(stream)
            corpus.update(digest)
            record["documents"] += 1
            record["bytes"] += len(stream)
        if drop_duplicates:
            seen.add(digest)
    if not record["documents"]:
        raise UserError(
            "0 documents", "training needs at least one", "look at the input and at what was dropped"
        )
    record |= {"sha256": corpus.hexdigest(), "tokens": record["bytes"]}

    merges = []
    for _ in tqdm(range(vocab_size - NUM_BYTES), "merges", unit="merge", disable=not progress):
        choice = trainer.merge()
        if choice is None:
            break
        left, right, places = choice
        merges.append((left, right))
        record["tokens"] -= places
    return merges, record
