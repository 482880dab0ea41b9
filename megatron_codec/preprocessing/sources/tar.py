"""Tar files in the layout of WebDataset, read as a stream: what is not wanted is passed over.

A tar file is cut among workers by the places of the headers in it: each worker walks from header to header,
which reads 512 bytes an item, and reads the items of its own range. One that is compressed can only be read
from its beginning, so one worker gets all of it.
"""

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from megatron_codec.preprocessing.sources.base import Item, unusable
from megatron_codec.preprocessing.sources.place import Place

SUFFIXES = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tar.xz")
POSITION = 1 << 14  # bytes
_CUT_SHORT = "tar file cut short or damaged"
_BROKEN = (tarfile.TarError, OSError, EOFError, zlib.error, lzma.LZMAError)


class TarSource:
    """Files of these suffixes in a tar file.

    Args:
        suffixes: endings of names, lower case, with the dot.
        start, stop: positions, for `part`.
    """

    def __init__(self, path: Path, suffixes: frozenset[str], start: int = 0, stop: int | None = None):
        self._path, self._suffixes, self._start = path, suffixes, start
        self._stop = max(1, -(-path.stat().st_size // POSITION)) if stop is None else stop

    @property
    def size(self) -> int:
        """Number of positions of 16 KiB."""
        return self._stop - self._start

    @property
    def digest(self) -> str:
        """Name and size of the file."""
        return f"{self._path.name} {self._path.stat().st_size} {self._start} {self._stop}"

    def part(self, start: int, stop: int) -> "TarSource":
        """See `Source`."""
        return TarSource(self._path, self._suffixes, self._start + start, self._start + stop)

    def __iter__(self) -> Iterator[Item]:
        compressed = self._path.suffix != ".tar"
        if self._start >= self._stop or (compressed and self._start > 0):
            return
        with open(self._path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            last = max(0, -(-size // POSITION) - 1)
            tar = None
            try:
                tar = tarfile.open(fileobj=file, mode="r|*" if compressed else "r:", tarinfo=_StrictMember)  # noqa: SIM115
                yield from self._items(tar, compressed)
                return
            except _BROKEN as error:
                fault = f"{error} after {tar.offset if tar else 0:,} bytes"
            offset = 0 if compressed or tar is None else tar.offset
            # All parts meet the fault; the one that it lies in reports it.
            position = min(offset // POSITION, last)
            if self._start <= position < self._stop:
                name = self._path.name
                yield unusable(name, f"{self._path}", position - self._start, _CUT_SHORT, fault, faulty=True)

    def _items(self, tar: tarfile.TarFile, compressed: bool) -> Iterator[Item]:
        seen: set[str] = set()
        while (member := tar.next()) is not None:
            vars(tar)["members"].clear()  # or it keeps them all
            position = 0 if compressed else member.offset // POSITION
            if position >= self._stop:
                return
            name = member.name.removeprefix("./")
            base = os.path.basename(name)
            suffix = os.path.splitext(base)[1].lower()
            if not member.isfile() or base.startswith(".") or suffix not in self._suffixes:
                continue
            repeated = name in seen
            seen.add(name)
            if position < self._start:
                continue
            full, label = f"{self._path.name}/{name}", f"{self._path}/{name}"
            place = position - self._start
            if repeated:
                yield unusable(full, label, place, "named twice", "is named before in the same tar file")
            else:
                # Of a compressed tar file, and of a file with holes, the content lies nowhere as it is.
                there = Place(str(self._path), member.offset_data, member.size)
                where = None if compressed or member.issparse() else there
                yield Item(full, label, place, _reader(tar, member), place=where)


class _StrictMember(tarfile.TarInfo):
    """Python's tarfile takes a header that it cannot read for the end of the file; here it is a fault."""

    @classmethod
    def fromtarfile(cls, tarfile_: tarfile.TarFile) -> "_StrictMember":
        """The next member; see `tarfile.TarInfo.fromtarfile`."""
        try:
            return super().fromtarfile(tarfile_)
        except tarfile.HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the block of zeros that has to be there
                raise
            raise tarfile.ReadError(f"{error}") from error


def _reader(tar: tarfile.TarFile, member: tarfile.TarInfo):
    def read() -> bytes:
        file = tar.extractfile(member)
        assert file is not None
        return file.read()

    return read
