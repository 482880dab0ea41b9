"""Whether a dataset is what its manifest says, and if not, where it first differs.

    verify_dataset("data/train", decode=True)

Documents are numbered as in `CodecDataset`, over all shards; bytes are counted from 0 in the file named.
Takes the same memory however many documents there are.
"""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from tqdm import tqdm

from megatron_codec.codecs import Codec, get_codec
from megatron_codec.data import CodecDataset, Manifest, Shard
from megatron_codec.data.manifest import BLOCK, Fingerprint
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer

_HEADER = 34  # bytes of a .idx before the lengths; data/indexed.py describes its layout
_DOCUMENTS = 1024 * BLOCK  # whose part of the index is in memory at once
_CHUNK = 1 << 22  # bytes

_COPY = "copy the file again from where it is whole, or write the dataset again"
_WRITE = "its checksum fits, so it was written like this: write the dataset again"


def verify_dataset(prefix: str | os.PathLike, decode: bool = False, progress: bool = True) -> Manifest:
    """Compares all of the dataset PREFIX with its manifest, which is returned.

    Checks the manifest's own checksum; sizes, index and SHA-256 of each shard's files; the checksum of every
    256 documents; and that each document is BOS, ids that the tokenizer has, EOS.

    Args:
        decode: also check that the ids of each document are what the tokenizer gives for its bytes, that the
            codec finds these valid and decodes them, and the shards' fingerprints.

    Raises UserError for the first fault, with file, document and byte as far as they can be told.
    """
    prefix = Path(prefix)
    path, partial = Path(f"{prefix}.json"), Path(f"{prefix}.partial")
    if partial.is_dir() and not path.exists():
        rule = "is a dataset whose preprocessing was stopped half-way"
        raise UserError(f"{partial}", rule, "run the same preprocessing command again; it goes on from there")
    manifest = CodecDataset.open(prefix).manifest
    contract = _Contract(manifest, path, decode)
    if decode:
        bar = tqdm(desc=f"{prefix}", total=manifest.documents, unit=" documents", disable=not progress)
    else:
        size = sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards)
        bar = tqdm(desc=f"{prefix}", total=size, unit="B", unit_scale=True, disable=not progress)
    first = 0
    with bar:
        for shard in manifest.shards:
            target = prefix.parent / shard.name
            with _opened(f"{target}.idx") as idx, _opened(f"{target}.bin") as tokens:
                index = _Index(idx, shard, first)
                index.check()
                bar.update(0 if decode else shard.idx_bytes)
                _check_tokens(tokens, index, contract, path, bar)
            first += shard.documents
    return manifest


@dataclass(frozen=True)
class _Input:
    """An open file whose faults are told with their place."""

    path: str
    file: IO[bytes]

    def read(self, offset: int, size: int) -> bytes:
        """So many bytes from there. Raises UserError if they cannot be had."""
        try:
            self.file.seek(offset)
            content = self.file.read(size)
        except OSError as error:
            place = f"{self.path}: bytes {offset} to {offset + size - 1}"
            raise UserError(place, f"cannot be read: {error.strerror}", _COPY) from error
        if len(content) < size:
            raise UserError(f"{self.path}: byte {offset + len(content)}", "the file ends here", _COPY)
        return content


@contextlib.contextmanager
def _opened(path: str) -> Iterator[_Input]:
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise UserError(path, f"cannot be read: {error.strerror}") from error
        yield _Input(path, file)


@dataclass(frozen=True)
class _Index:
    """The .idx of a shard; its size and header have been checked.

    Args:
        first: number of the shard's first document in the dataset.
    """

    file: _Input
    shard: Shard
    first: int

    def lengths(self, start: int, stop: int) -> np.ndarray:
        """Tokens of the shard's documents `start` to `stop`, int64 [stop - start]."""
        return self._part("<i4", _HEADER, start, stop).astype(np.int64)

    def pointers(self, start: int, stop: int) -> np.ndarray:
        """Where they begin in the .bin, int64 [stop - start], bytes; the one behind the last is its size."""
        count = self.shard.documents
        found = self._part("<i8", self._pointers_at, start, min(stop, count))
        return found if stop <= count else np.append(found, self.shard.bin_bytes)

    def check(self) -> None:
        """Raises UserError for the first fault."""
        count, size = self.shard.documents, self.shard.idx_bytes
        for start in range(0, count, _DOCUMENTS):
            stop = min(start + _DOCUMENTS, count)
            lengths, pointers = self.lengths(start, stop), self.pointers(start, stop + 1)
            if start == 0 and pointers[0] != 0:
                raise self._pointer_fault(0, int(pointers[0]), 0)
            # When each document ends where the next one begins, and the last one where the .bin ends, the
            # lengths add up to the manifest's number of tokens, too.
            wrong = np.flatnonzero((np.diff(pointers) != 2 * lengths) | (lengths < 1))
            if wrong.size:
                raise self._fault(start + int(wrong[0]))
            entries = self._part("<i8", self._entries_at, start, stop + (stop == count))
            wrong = np.flatnonzero(entries != np.arange(start, start + len(entries)))
            if wrong.size:
                i = start + int(wrong[0])
                rule = f"entry {i} of the document index is {entries[wrong[0]]}, must be {i}"
                raise self._document_fault(min(i, count - 1), self._entries_at + 8 * i, rule)
        whole = hashlib.sha256()
        for offset in range(0, size, _CHUNK):
            whole.update(self.file.read(offset, min(_CHUNK, size - offset)))
        if whole.hexdigest() != self.shard.idx_sha256:
            place = f"{self.file.path}: documents {self.first} to {self.first + count - 1}"
            rule = "lengths and pointers agree, but are not those of the SHA-256 in the manifest"
            raise UserError(place, rule, _COPY)

    @property
    def _pointers_at(self) -> int:
        return _HEADER + 4 * self.shard.documents

    @property
    def _entries_at(self) -> int:
        return _HEADER + 12 * self.shard.documents

    def _part(self, dtype: str, offset: int, start: int, stop: int) -> np.ndarray:
        size = np.dtype(dtype).itemsize
        return np.frombuffer(self.file.read(offset + size * start, size * (stop - start)), dtype)

    def _fault(self, i: int) -> UserError:
        """For the first document that is empty or does not end where the next one begins."""
        stop = min(i + 2, self.shard.documents)
        length, *following = self.lengths(i, stop).tolist()
        begin, *ends = self.pointers(i, stop + 1).tolist()
        # A wrong pointer takes from one document what it gives to its neighbour, a wrong length does not.
        if following and length > 0 and ends[1] == begin + 2 * (length + following[0]):
            return self._pointer_fault(i + 1, ends[0], begin + 2 * length)
        rule = f"its length is {length} tokens, and the pointers leave {ends[0] - begin} bytes for it"
        return self._document_fault(i, _HEADER + 4 * i, rule)

    def _pointer_fault(self, i: int, found: int, expected: int) -> UserError:
        rule = f"its pointer is {found}, and the lengths before it add up to {expected} bytes"
        return self._document_fault(i, self._pointers_at + 8 * i, rule)

    def _document_fault(self, i: int, offset: int, rule: str) -> UserError:
        return UserError(f"{self.file.path}: document {self.first + i}, byte {offset}", rule, _COPY)


def _check_tokens(file: _Input, index: _Index, contract: "_Contract", path: Path, bar: tqdm) -> None:
    """Checks the .bin of a shard whose index is right. Raises UserError for the first fault."""
    shard = index.shard
    blocks = -(-shard.documents // BLOCK)
    if len(shard.blocks) != 16 * blocks:
        raise UserError(f"{path}", f"must have a checksum for each of the {blocks} blocks of {shard.name}")
    whole, fingerprint = hashlib.sha256(), Fingerprint()
    for part in range(0, shard.documents, _DOCUMENTS):
        pointers = index.pointers(part, min(part + _DOCUMENTS, shard.documents) + 1)
        for start in range(0, len(pointers) - 1, BLOCK):
            bounds = pointers[start : start + BLOCK + 1]
            content = file.read(int(bounds[0]), int(bounds[-1] - bounds[0]))
            whole.update(content)
            number = (part + start) // BLOCK
            recorded = shard.blocks[16 * number : 16 * number + 16]
            altered = hashlib.sha256(content).hexdigest()[:16] != recorded
            block = _Block(file.path, index.first + part + start, content, bounds)
            block.check(contract, altered)
            if contract.decode:
                for i in range(block.documents):
                    fingerprint.add(block.document(i))
            bar.update(block.documents if contract.decode else len(content))
    if whole.hexdigest() != shard.bin_sha256:
        rule = "every block has its checksum, but the file not the SHA-256 in the manifest"
        raise UserError(file.path, rule, "write the dataset again")
    if contract.decode and fingerprint.hex != shard.fingerprint:
        raise UserError(f"{path}", f"the fingerprint is not that of {file.path}", "write the dataset again")


@dataclass(frozen=True)
class _Block:
    """Documents in a row that share a checksum.

    Args:
        first: number of the first one in the dataset.
        content: their tokens.
        bounds: where each begins, and the last one ends, in the file; int64 [documents + 1], bytes.
    """

    path: str
    first: int
    content: bytes
    bounds: np.ndarray

    @property
    def documents(self) -> int:
        """Number of documents."""
        return len(self.bounds) - 1

    def document(self, i: int) -> bytes:
        """The tokens of one, as they are in the file."""
        begin, end = (self.bounds[i : i + 2] - self.bounds[0]).tolist()
        return self.content[begin:end]

    def check(self, contract: "_Contract", altered: bool) -> None:
        """Raises UserError for the first fault; `altered` says that the checksum does not fit."""
        ids = np.frombuffer(self.content, "<u2")
        if not altered and not contract.decode and contract.fits(ids, (self.bounds - self.bounds[0]) // 2):
            return
        remedy = _COPY if altered else _WRITE
        for i in range(self.documents):
            fault = contract.fault(np.frombuffer(self.document(i), "<u2"), altered or contract.decode)
            if fault:
                offset = int(self.bounds[i])
                rule = fault.rule
                if fault.token is not None:
                    rule = f"token {fault.token}, at byte {offset + 2 * fault.token}, {rule}"
                raise UserError(f"{self.path}: document {self.first + i}, byte {offset}", rule, remedy)
        if altered:
            documents = f"documents {self.first} to {self.first + self.documents - 1}"
            place = f"{self.path}: {documents}, bytes {self.bounds[0]} to {self.bounds[-1] - 1}"
            raise UserError(place, "the checksum in the manifest is another one", remedy)


@dataclass(frozen=True)
class _Fault:
    """What is wrong with a document, and from which of its tokens on, where that can be told."""

    token: int | None
    rule: str


class _Contract:
    """What every document has to be by the manifest.

    Args:
        path: of the manifest.
        decode: whether documents have to decode.
    """

    def __init__(self, manifest: Manifest, path: Path, decode: bool):
        self.decode = decode
        self._codec: Codec | None = None
        try:
            self._tokenizer = Tokenizer.from_dict(manifest.tokenizer)
            with contextlib.nullcontext() if decode else contextlib.suppress(UserError):
                self._codec = get_codec(**manifest.codec)  # which may be installed elsewhere only
        except UserError as error:
            raise UserError(f"{path}: {error.value}", error.rule, error.remedy) from error

    def fits(self, ids: np.ndarray, bounds: np.ndarray) -> bool:
        """Whether documents in a row are BOS, ids in range without BOS and EOS, EOS.

        Args:
            ids: uint16 [tokens].
            bounds: where each begins, and the last one ends, int64 [documents + 1]; none is empty.
        """
        bos, eos, count = self._tokenizer.bos, self._tokenizer.eos, len(bounds) - 1
        return bool(
            ids.max() < self._tokenizer.num_tokens
            and (ids[bounds[:-1]] == bos).all()
            and (ids[bounds[1:] - 1] == eos).all()
            and np.count_nonzero(ids == bos) == count
            and np.count_nonzero(ids == eos) == count
        )

    def fault(self, ids: np.ndarray, with_stream: bool) -> _Fault | None:
        """The first fault of one document, uint16 [length]; of its stream, too, if that is wanted."""
        fault = self._fault_of_ids(ids)
        return self._fault_of_stream(ids) if fault is None and with_stream else fault

    def _fault_of_ids(self, ids: np.ndarray) -> _Fault | None:
        bos, eos, count = self._tokenizer.bos, self._tokenizer.eos, self._tokenizer.num_tokens
        outside = np.flatnonzero(ids >= count)
        if outside.size:
            return _Fault(int(outside[0]), f"is {ids[outside[0]]}, and there are {count} ids")
        if ids[0] != bos:
            return _Fault(0, f"is {ids[0]}, must be BOS, {bos}")
        if ids[-1] != eos:
            return _Fault(len(ids) - 1, f"is {ids[-1]}, must be EOS, {eos}")
        inside = np.flatnonzero((ids[1:-1] == bos) | (ids[1:-1] == eos))
        if inside.size:
            place = int(inside[0]) + 1
            return _Fault(place, f"is {'BOS' if ids[place] == bos else 'EOS'} inside the document")
        return None

    def _fault_of_stream(self, ids: np.ndarray) -> _Fault | None:
        try:
            stream = self._tokenizer.decode(ids)
        except UserError as error:
            return _Fault(None, f"its ids do not decode: {error}")
        expected, _ = self._tokenizer.encode_batch([stream], add_special_tokens=True)
        if not np.array_equal(ids, expected):
            both = min(len(ids), len(expected))
            place = int(np.argmax(ids[:both] != expected[:both]))
            rule = f"is {ids[place]}, and the tokenizer gives {expected[place]} for the same bytes"
            return _Fault(place, rule)
        if self._codec is None:
            return None
        report = self._codec.check(stream)
        if not report.valid:
            place = "" if report.offset is None else f", at byte {report.offset} of its stream"
            return _Fault(None, f"the codec finds a fault: {report.reason}{place}")
        if self.decode:
            try:
                self._codec.decode(stream)
            except UserError as error:
                return _Fault(None, f"does not decode: {error}")
        return None
