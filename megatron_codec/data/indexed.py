"""Megatron's indexed dataset, the files PREFIX.bin and PREFIX.idx, without Megatron.

PREFIX.bin is the token ids of all documents one after another, uint16, little-endian. PREFIX.idx, all
little-endian, is

    magic                 9 bytes  MMIDIDX 00 00
    version               uint64   1
    type of the ids       uint8    8 (uint16)
    number of sequences   uint64   n
    length of the document index   uint64   n + 1
    sequence lengths      int32[n]      tokens
    sequence pointers     int64[n]      bytes from the start of PREFIX.bin
    document index        int64[n + 1]  0 ... n, since each document is one sequence

as `megatron.core.datasets.indexed_dataset` reads it (Megatron-Core 0.16).
"""

import contextlib
import hashlib
import os
import struct
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import IO

import numpy as np

from megatron_codec.data.manifest import BLOCK, Fingerprint, Shard
from megatron_codec.errors import UserError
from megatron_codec.files import whole_file

_HEADER = struct.Struct("<9sQBQQ")
_MAGIC, _VERSION, _UINT16 = b"MMIDIDX\x00\x00", 1, 8


class IndexedWriter:
    """Appends documents to one shard.

    `indexed_writer` makes one for a shard that is written in one go.
    """

    def __init__(self, name: str, bin_file: IO[bytes]):
        self._name, self._bin_file = name, bin_file
        self._bin_sha256, self._idx_sha256 = hashlib.sha256(), hashlib.sha256()
        self._lengths = array("i")
        self._fingerprint = Fingerprint()
        self._block, self._blocks = hashlib.sha256(), bytearray()

    @property
    def documents(self) -> int:
        """Documents so far."""
        return len(self._lengths)

    def add(self, document: np.ndarray) -> bytes:
        """Writes one document: token ids, uint16 [length], BOS and EOS included; returns its bytes."""
        if document.dtype != np.uint16 or document.ndim != 1:
            raise ValueError(f"a document is uint16 [length], not {document.dtype} {list(document.shape)}")
        content = document.astype("<u2", copy=False).tobytes()
        self._bin_file.write(content)
        self.count(content)
        return content

    def count(self, content: bytes) -> None:
        """Takes note of a document that is in the file already, of its bytes."""
        self._bin_sha256.update(content)
        self._block.update(content)
        self._fingerprint.add(content)
        self._lengths.append(len(content) // 2)
        if len(self._lengths) % BLOCK == 0:
            self._end_block()

    def _end_block(self) -> None:
        self._blocks += self._block.digest()[:8]
        self._block = hashlib.sha256()

    def write_index(self, idx_file: IO[bytes]) -> None:
        """Writes the index of the documents so far."""
        lengths = np.frombuffer(self._lengths, np.int32)
        count = len(lengths)
        ends = np.cumsum(lengths, dtype=np.int64) * 2
        for part in (
            _HEADER.pack(_MAGIC, _VERSION, _UINT16, count, count + 1),
            lengths.astype("<i4").tobytes(),
            (ends - lengths.astype(np.int64) * 2).astype("<i8").tobytes(),
            np.arange(count + 1, dtype="<i8").tobytes(),
        ):
            idx_file.write(part)
            self._idx_sha256.update(part)

    def shard(self) -> Shard:
        """The entry of this shard in the manifest; after `write_index`."""
        rest = self._block.digest()[:8] if len(self._lengths) % BLOCK else b""
        return Shard(
            name=self._name,
            documents=len(self._lengths),
            tokens=int(np.frombuffer(self._lengths, np.int32).sum(dtype=np.int64)),
            bin_sha256=self._bin_sha256.hexdigest(),
            idx_sha256=self._idx_sha256.hexdigest(),
            fingerprint=self._fingerprint.hex,
            blocks=(self._blocks + rest).hex(),
        )


@contextlib.contextmanager
def indexed_writer(prefix: str | os.PathLike) -> Iterator[IndexedWriter]:
    """Opens PREFIX.bin and PREFIX.idx for writing; they appear when the block ends without an exception."""
    prefix = Path(prefix)
    with whole_file(f"{prefix}.bin") as bin_file, whole_file(f"{prefix}.idx") as idx_file:
        writer = IndexedWriter(prefix.name, bin_file)
        yield writer
        writer.write_index(idx_file)


class IndexedReader:
    """Maps one shard into memory; nothing is read until it is asked for.

    Args:
        prefix: path without `.bin` and `.idx`.
        shard: what the manifest says of it.

    Raises UserError where a file is missing or its format or size is not what the manifest says. That
    takes constant time; contents are not looked into.
    """

    def __init__(self, prefix: str | os.PathLike, shard: Shard):
        self._bin_path, self._idx_path = Path(f"{prefix}.bin"), Path(f"{prefix}.idx")
        self._documents = count = shard.documents
        _require_size(self._bin_path, shard.bin_bytes)
        _require_size(self._idx_path, shard.idx_bytes)
        try:
            with open(self._idx_path, "rb") as file:
                header = _HEADER.unpack(file.read(_HEADER.size))
        except OSError as error:
            remedy = "mend its permissions, or copy it again"
            raise UserError(f"{self._idx_path}", f"cannot be read: {error.strerror}", remedy) from error
        if header != (_MAGIC, _VERSION, _UINT16, count, count + 1):
            rule = (
                f"bytes 0 to {_HEADER.size - 1} are not the header of an index of {count} documents in uint16"
            )
            raise UserError(f"{self._idx_path}", rule, "copy it again, or write the dataset again")

    def document(self, index: int) -> np.ndarray:
        """Token ids of one document, uint16 [length], read-only, not copied."""
        start = self._pointers[index] >> 1
        return self._tokens[start : start + self.lengths[index]]

    @cached_property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, int32 [documents], read-only."""
        return self._index_part("<i4", _HEADER.size, self._documents)

    @cached_property
    def _pointers(self) -> np.ndarray:
        return self._index_part("<i8", _HEADER.size + 4 * self._documents, self._documents)

    @cached_property
    def _tokens(self) -> np.ndarray:
        # A plain ndarray over the mapping: slices of np.memmap itself are several times slower.
        return np.memmap(self._bin_path, "<u2", "r").view(np.ndarray)

    def _index_part(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return np.memmap(self._idx_path, dtype, "r", offset, (count,)).view(np.ndarray)


def _require_size(path: Path, expected: int) -> None:
    if not path.is_file():
        raise UserError(f"{path}", "is named in the manifest and missing", "copy it here, or write it again")
    size = path.stat().st_size
    if size != expected:
        raise UserError(
            f"{path}: {size:,} bytes", f"must be {expected:,} bytes by the manifest", "copy or write it again"
        )
