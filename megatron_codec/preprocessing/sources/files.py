"""Files: below a folder, or named in a list."""

import hashlib
import os
from array import array
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from megatron_codec.errors import UserError
from megatron_codec.preprocessing.sources.base import Item, unusable
from megatron_codec.preprocessing.sources.place import Place


class Names:
    """A sequence of names in two files, mapped into memory: 23 million names are no load to a process.

    Args:
        path: the files are PATH.names and PATH.ends.
        digest: SHA-256 of all names.
    """

    def __init__(self, path: Path, digest: str):
        self._path, self.digest = path, digest

    def __reduce__(self):
        return Names, (self._path, self.digest)

    @classmethod
    def write(cls, path: Path, names: Iterable[str]) -> "Names":
        """Writes names, one after the other as they come."""
        path.parent.mkdir(parents=True, exist_ok=True)
        digest, end = hashlib.sha256(), 0
        with open(f"{path}.names", "wb") as names_file, open(f"{path}.ends", "wb") as ends_file:
            for name in names:
                content = os.fsencode(name)
                digest.update(content + b"\n")
                end += len(content)
                names_file.write(content)
                ends_file.write(end.to_bytes(8, "little"))
        return cls(path, digest.hexdigest())

    def __len__(self) -> int:
        return os.path.getsize(f"{self._path}.ends") // 8

    def __getitem__(self, index: int) -> str:
        start = int(self._ends[index - 1]) if index else 0
        return os.fsdecode(self._content[start : int(self._ends[index])].tobytes())

    @cached_property
    def _ends(self) -> np.ndarray:
        return np.memmap(f"{self._path}.ends", "<u8", "r").view(np.ndarray)

    @cached_property
    def _content(self) -> np.ndarray:
        return np.memmap(f"{self._path}.names", np.uint8, "r").view(np.ndarray)


class FileSource:
    """Files of these names below a folder.

    Args:
        repeated: positions of names that were there before, ascending.
    """

    def __init__(
        self,
        folder: Path,
        names: Names,
        repeated: tuple[int, ...] = (),
        start: int = 0,
        stop: int | None = None,
    ):
        self._folder, self._names, self._repeated, self._start = folder, names, repeated, start
        self._stop = len(names) if stop is None else stop

    @property
    def size(self) -> int:
        """Number of files."""
        return self._stop - self._start

    @property
    def digest(self) -> str:
        """Hash of the names."""
        return f"{self._names.digest} {self._start} {self._stop}"

    def part(self, start: int, stop: int) -> "FileSource":
        """See `Source`."""
        return FileSource(self._folder, self._names, self._repeated, self._start + start, self._start + stop)

    def __iter__(self) -> Iterator[Item]:
        repeated = {place for place in self._repeated if self._start <= place < self._stop}
        folder = "" if self._folder == Path() else str(self._folder)
        for i in range(self._start, self._stop):
            name = self._names[i]
            path = os.path.join(folder, name)
            if i in repeated:
                reason = "is named before in the same list"
                yield unusable(name, path, i - self._start, "named twice", reason)
            else:
                yield Item(name, path, i - self._start, _Reader(path), place=Place(path))


class _Reader:
    __slots__ = ("_path",)

    def __init__(self, path: str):
        self._path = path

    def __call__(self) -> bytes:
        with open(self._path, "rb", buffering=0) as file:
            return file.readall()


def repeated_names(names: Names) -> tuple[int, ...]:
    """Positions of names that were there before, ascending. Takes 8 bytes a name meanwhile."""
    hashes = array("Q")
    for i in range(len(names)):
        digest = hashlib.blake2b(os.fsencode(names[i]), digest_size=8).digest()
        hashes.append(int.from_bytes(digest, "little"))
    values = np.frombuffer(hashes, np.uint64)
    order = np.argsort(values, kind="stable")
    again = order[1:][values[order][1:] == values[order][:-1]]
    return tuple(sorted(again.tolist()))


def walk(folder: Path) -> Iterator[str]:
    """Names of all files below a folder that are not hidden, relative to it; links to folders not followed.

    In the order of their names, the files of a folder before its folders.
    """
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders.sort()
        within = os.path.relpath(parent, folder)
        for file in sorted(files):
            if not file.startswith("."):
                yield file if within == "." else f"{within}/{file}"


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}", f"cannot be searched: {error.strerror}", "mend its permissions")
