"""One shard on its way: tokens, and a journal that says how far they go, so that a run goes on where it was.

In the folder PREFIX.partial, for a shard NAME:

    NAME.bin         tokens, as they will be in PREFIX's own file
    NAME.documents   a record for each document: its length, and a hash to find duplicates by
    NAME.journal     a JSON object a line, written after the others: how many items, documents and bytes there
                     are, their CRC-32, and what was skipped since the line before
    NAME.done        the finished shard's entry in the manifest

After a kill, or a loss of power, everything behind the last line that the files agree with is cut off, and
the items behind it are read again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from megatron_codec.data import Shard
from megatron_codec.data.indexed import IndexedWriter
from megatron_codec.errors import UserError
from megatron_codec.files import whole_file, write_json
from megatron_codec.preprocessing.skipping import Skipped

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# Length in tokens, and the first 8 bytes of the SHA-256 of the tokens.
RECORD = np.dtype([("length", "<u4"), ("digest", "<u8")])

_CHUNK = 1 << 20
_PATIENCE = 10.0  # seconds that a worker of a killed run may take to notice


@dataclass(frozen=True)
class Finished:
    """A finished shard: its entry in the manifest, the items read for it, and those that were skipped."""

    shard: Shard
    items: int
    skipped: list[Skipped]


class ShardFiles:
    """Names of a shard's files.

    Args:
        folder: PREFIX.partial.
        target: the shard's prefix when it is finished.
    """

    def __init__(self, folder: Path, target: Path):
        self.target = target
        self.bin, self.documents = folder / f"{target.name}.bin", folder / f"{target.name}.documents"
        self.journal, self.done = folder / f"{target.name}.journal", folder / f"{target.name}.done"

    def finished(self) -> Finished | None:
        """The finished shard, or None as long as it is not."""
        if not self.done.exists():
            return None
        content = json.loads(self.done.read_bytes())
        skipped = [Skipped(**entry) for entry in content["skipped"]]
        return Finished(Shard(**content["shard"]), content["items"], skipped)


class ShardJournal:
    """Writes a shard so that it can be stopped at any moment, and goes on where it was.

        with ShardJournal(files) as journal:
            for ... in items[journal.items:]:
                journal.append(1, [document], [])
            journal.finish()

    `items` is the number of items that are dealt with, `position` what the caller gave with the last of them.
    Raises UserError if another process writes the same shard.
    """

    def __init__(self, files: ShardFiles):
        self._files = files
        self.items = self.position = 0
        self.skipped: list[Skipped] = []
        self._size = self._crc = 0

    def __enter__(self) -> "ShardJournal":
        files = self._files
        files.bin.parent.mkdir(parents=True, exist_ok=True)
        if not files.bin.exists() and files.journal.exists() and Path(f"{files.target}.bin").exists():
            os.replace(f"{files.target}.bin", files.bin)  # killed while it was being finished
        with contextlib.ExitStack() as stack:
            self._journal: IO[bytes] = stack.enter_context(_open(files.journal))
            _lock(self._journal, files.target)
            self._bin: IO[bytes] = stack.enter_context(_open(files.bin))
            self._documents: IO[bytes] = stack.enter_context(_open(files.documents))
            self._writer = IndexedWriter(files.target.name, self._bin)
            self._recover()
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # What a failed write left in a buffer fails again; the journal knows nothing of it.
        with contextlib.suppress(OSError) if error else contextlib.nullcontext():
            self._stack.close()

    def append(
        self, items: int, position: int, documents: Sequence[np.ndarray], skipped: Sequence[Skipped]
    ) -> None:
        """Notes that `items` more items gave these documents (uint16 [length]) and these skipped ones."""
        records = np.zeros(len(documents), RECORD)
        for i, document in enumerate(documents):
            content = self._writer.add(document)
            self._size += len(content)
            self._crc = zlib.crc32(content, self._crc)
            digest = hashlib.sha256(content).digest()
            records[i] = len(document), int.from_bytes(digest[:8], "little")
        self._crc = zlib.crc32(records.tobytes(), self._crc)
        self._documents.write(records.tobytes())
        self.items += items
        self.position = position
        self.skipped += skipped
        line = {
            "items": self.items,
            "position": position,
            "documents": self._writer.documents,
            "bytes": self._size,
            "crc": self._crc,
            "skipped": [dataclasses.astuple(entry) for entry in skipped],
        }
        self._bin.flush()
        self._documents.flush()
        self._journal.write(json.dumps(line).encode() + b"\n")
        self._journal.flush()

    def finish(self) -> Finished:
        """Gives the shard's files their names. A shard without documents gets no files."""
        target = self._files.target
        os.fsync(self._bin.fileno())
        if self._writer.documents:
            with whole_file(f"{target}.idx", scratch=self._files.bin.parent) as idx_file:
                self._writer.write_index(idx_file)
            os.replace(self._files.bin, f"{target}.bin")
        finished = Finished(self._writer.shard(), self.items, self.skipped)
        write_json(self._files.done, dataclasses.asdict(finished))
        return finished

    def _recover(self) -> None:
        """Finds the last line that the files agree with, and cuts off what lies behind it."""
        bin_size, documents_size = (_size(file) for file in (self._bin, self._documents))
        self._bin.seek(0)
        self._documents.seek(0)
        good, journal_size, end = {"bytes": 0, "documents": 0}, 0, 0
        self._journal.seek(0)
        for written in self._journal:
            end += len(written)
            line = _parsed(written)
            if (
                line is None
                or line["bytes"] > bin_size
                or line["documents"] * RECORD.itemsize > documents_size
            ):
                break
            records = self._documents.read((line["documents"] - good["documents"]) * RECORD.itemsize)
            crc = _crc_of(self._bin, line["bytes"] - good["bytes"], self._crc)
            crc = zlib.crc32(records, crc)
            if crc != line["crc"]:
                break
            good, journal_size, self._crc = line, end, crc
            self.skipped += [Skipped(*entry) for entry in line["skipped"]]
            self.items, self.position = line["items"], line["position"]
        self._size = good["bytes"]
        sizes = {
            self._bin: self._size,
            self._documents: good["documents"] * RECORD.itemsize,
            self._journal: journal_size,
        }
        self._bin.seek(0)
        self._documents.seek(0)
        for _ in range(good["documents"]):
            (record,) = np.frombuffer(self._documents.read(RECORD.itemsize), RECORD)
            self._writer.count(self._bin.read(2 * int(record["length"])))
        for file, size in sizes.items():
            file.truncate(size)
            file.seek(size)


def _open(path: Path) -> IO[bytes]:
    path.touch()
    return open(path, "r+b")


def _size(file: IO[bytes]) -> int:
    return os.fstat(file.fileno()).st_size


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A whole line of the journal, or None for one that was cut short."""
    try:
        return json.loads(line) if line.endswith(b"\n") else None
    except ValueError:
        return None


def _crc_of(file: IO[bytes], count: int, crc: int) -> int:
    while count:
        chunk = file.read(min(count, _CHUNK))
        if not chunk:
            return -1
        crc = zlib.crc32(chunk, crc)
        count -= len(chunk)
    return crc


def _lock(file: IO[bytes], target: Path) -> None:
    """Holds a lock as long as the file is open; the system lets go of it when the process ends."""
    if fcntl is None:
        return
    deadline = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline:
                rule = "is being written by another run"
                raise UserError(f"{target}", rule, "wait for it, or choose another prefix") from None
            time.sleep(0.1)
        except OSError:  # a file system without locks
            return
