"""A dataset by its prefix: documents of token ids, each `BOS ids EOS`, in one or more shards."""

import bisect
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatron_codec.data.indexed import IndexedReader, indexed_writer
from megatron_codec.data.manifest import Manifest
from megatron_codec.errors import UserError


class CodecDataset:
    """The documents `start` to `stop` of the dataset at a prefix; made by `open`, `view` and `split`.

    Documents are mapped into memory, so opening takes no time and processes share what they read.
    """

    def __init__(self, prefix: Path, manifest: Manifest, readers: list[IndexedReader], start: int, stop: int):
        self.prefix, self.manifest = prefix, manifest
        self._readers, self._start, self._stop = readers, start, stop
        self._shard_ends = list(accumulate(shard.documents for shard in manifest.shards))

    @classmethod
    def open(cls, prefix: str | os.PathLike) -> "CodecDataset":
        """The whole dataset PREFIX.json with its shards.

        Takes constant time for each shard: formats and sizes are checked, contents are not. Raises
        UserError with the file, what is wrong, and the remedy.
        """
        prefix = Path(prefix)
        manifest = Manifest.load(f"{prefix}.json")
        readers = [IndexedReader(prefix.parent / shard.name, shard) for shard in manifest.shards]
        return cls(prefix, manifest, readers, 0, manifest.documents)

    def __reduce__(self):  # to other processes only the name travels, never the tokens
        return _reopen, (self.prefix, self._start, self._stop)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return self._stop - self._start

    @cached_property
    def num_tokens(self) -> int:
        """Number of tokens, BOS and EOS of each document included."""
        return int(self.lengths.sum(dtype=np.int64))

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents]; copied only where the documents span shards."""
        parts = [np.zeros(0, np.int32)]
        for reader, end in zip(self._readers, self._shard_ends, strict=True):
            begin = end - len(reader.lengths)
            part = reader.lengths[max(0, self._start - begin) : max(0, self._stop - begin)]
            if len(part):
                parts.append(part)
        return parts[1] if len(parts) == 2 else np.concatenate(parts)

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document, uint16 [length], read-only, not copied."""
        if not 0 <= index < self.num_documents:
            raise IndexError(f"document {index} of {self.num_documents}")
        index += self._start
        shard = bisect.bisect_right(self._shard_ends, index)
        return self._readers[shard].document(index - (self._shard_ends[shard - 1] if shard else 0))

    def view(self, start: int, stop: int) -> "CodecDataset":
        """The documents `start` to `stop` (excluded) of this dataset, as a dataset."""
        if not 0 <= start <= stop <= self.num_documents:
            raise IndexError(f"documents {start} to {stop} of {self.num_documents}")
        return CodecDataset(
            self.prefix, self.manifest, self._readers, self._start + start, self._start + stop
        )

    def split(self, weights: Sequence[float]) -> list["CodecDataset"]:
        """Views of contiguous documents in these proportions, as Megatron's `--split 969,30,1`."""
        if not weights or min(weights) < 0 or not 0 < sum(weights) < float("inf"):
            raise UserError(f"split {list(weights)}", "must be numbers of at least 0 with a sum above 0")
        shares = accumulate(weights, initial=0)
        bounds = [round(self.num_documents * share / sum(weights)) for share in shares]
        return [self.view(start, stop) for start, stop in pairwise(bounds)]


def write_dataset(
    prefix: str | os.PathLike,
    documents: Iterable[np.ndarray],
    codec: dict[str, Any],
    tokenizer: dict[str, Any],
    **manifest: Any,
) -> Manifest:
    """Writes documents (uint16 [length], BOS and EOS included) as a dataset of one shard.

    Args:
        codec, tokenizer, manifest: fields of `Manifest`.
    """
    with indexed_writer(prefix) as writer:
        for document in documents:
            writer.add(document)
    written = Manifest(codec=codec, tokenizer=tokenizer, shards=[writer.shard()], **manifest)
    written.save(f"{prefix}.json")
    return written


def _reopen(prefix: Path, start: int, stop: int) -> CodecDataset:
    return CodecDataset.open(prefix).view(start, stop)
