"""Pictures in arrays: idx files (the format of MNIST, gzipped or not), .npy, and .npz with its arrays.

Read as streams, picture by picture, so that an array may be larger than the memory.
"""

import gzip
import math
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, cast

import numpy as np

from megatron_codec.errors import UserError
from megatron_codec.preprocessing.sources.base import Item, UnusableError

IDX_MAGIC = (b"\x00\x00\x08\x03", b"\x00\x00\x08\x04")  # unsigned bytes in 3 or 4 dimensions
NPY_MAGIC, NPZ_MAGIC = b"\x93NUM", b"PK\x03\x04"
_CHUNK = 1 << 20
_BROKEN = (OSError, EOFError, zlib.error, zipfile.BadZipFile)


@dataclass(frozen=True)
class Pictures:
    """Where an array of pictures lies in a file.

    Args:
        member: of a .npz file, else None.
        offset: bytes before the first picture.
        shape: [pictures, height, width] or [pictures, height, width, 3]; uint8.
    """

    path: Path
    member: str | None
    offset: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the file without its folder, and of the array if there can be several."""
        name = self.path.name.removesuffix(".gz")
        return name if self.member is None else f"{name}/{self.member.removesuffix('.npy')}"

    def open(self) -> IO[bytes]:
        """The uncompressed bytes."""
        if self.member is not None:
            return zipfile.ZipFile(self.path).open(self.member)
        return cast(IO[bytes], gzip.open(self.path)) if is_gzip(self.path) else open(self.path, "rb")


class ArraySource:
    """Pictures `start` to `stop` of an array."""

    def __init__(self, pictures: Pictures, start: int, stop: int):
        self._pictures, self._start, self._stop = pictures, start, stop

    @property
    def size(self) -> int:
        """Number of pictures."""
        return self._stop - self._start

    @property
    def digest(self) -> str:
        """Name, size and shape."""
        pictures = self._pictures
        return f"{pictures.name} {pictures.path.stat().st_size} {pictures.shape} {self._start} {self._stop}"

    def part(self, start: int, stop: int) -> "ArraySource":
        """See `Source`."""
        return ArraySource(self._pictures, self._start + start, self._start + stop)

    def __iter__(self) -> Iterator[Item]:
        pictures = self._pictures
        shape = pictures.shape[1:]
        step = math.prod(shape)
        with pictures.open() as stream:

            def read(i: int) -> np.ndarray:
                try:
                    stream.seek(pictures.offset + i * step)
                    content = stream.read(step)
                except _BROKEN as error:
                    raise UnusableError("truncated or damaged array", f"cannot be read: {error}") from error
                if len(content) < step:
                    raise UnusableError("truncated or damaged array", "the file ends before this picture")
                return np.frombuffer(content, np.uint8).reshape(shape)

            for i in range(self._start, self._stop):
                label = f"{pictures.path.parent / pictures.name}[{i}]"
                yield Item(f"{pictures.name}[{i}]", label, i - self._start, lambda i=i: read(i))


def open_arrays(path: Path) -> list[ArraySource]:
    """The arrays of pictures in a file; others in a .npz, such as labels, are passed over.

    Raises UserError for a file that is damaged, or holds no pictures of 8 bits.
    """
    try:
        if is_gzip(path) or magic(path) in IDX_MAGIC:
            found = [_idx(path)]
        elif magic(path) == NPY_MAGIC:
            with open(path, "rb") as stream:
                found = [_npy(path, None, stream, path.stat().st_size)]
        else:
            with zipfile.ZipFile(path) as archive:
                members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
                found = [_npy(path, i.filename, archive.open(i.filename), i.file_size) for i in members]
    except (*_BROKEN, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}", f"cannot be read: {error}", "fetch the file again") from error
    pictures = [array for array in found if array is not None]
    if not pictures:
        rule = "holds no pictures: an array of uint8 [n, height, width] or [n, height, width, 3]"
        raise UserError(f"{path}", rule, "convert it, grey or RGB, 8 bits, channels last")
    return [ArraySource(array, 0, array.shape[0]) for array in pictures]


def is_gzip(path: Path) -> bool:
    """Whether a file is compressed by gzip."""
    return magic(path)[:2] == b"\x1f\x8b"


def magic(path: Path) -> bytes:
    """The first four bytes."""
    with open(path, "rb") as file:
        return file.read(4)


def _idx(path: Path) -> Pictures:
    with gzip.open(path) if is_gzip(path) else open(path, "rb") as stream:
        head = stream.read(4)
        sizes = stream.read(4 * head[3])
        if is_gzip(path):
            found = sum(len(chunk) for chunk in iter(lambda: stream.read(_CHUNK), b""))
        else:
            found = path.stat().st_size - len(head) - len(sizes)
    shape = tuple(int.from_bytes(sizes[i : i + 4], "big") for i in range(0, 4 * head[3], 4))
    if found != math.prod(shape) or shape[3:] not in ((), (3,)):
        rule = f"must hold {' x '.join(map(str, shape))} bytes (grey, or 3 channels last)"
        raise UserError(f"{path}: {max(0, found):,} bytes of pixels", rule, "fetch the file again")
    return Pictures(path, None, 4 + 4 * len(shape), shape)


def _npy(path: Path, member: str | None, stream: IO[bytes], size: int) -> Pictures | None:
    version = np.lib.format.read_magic(stream)
    if version == (1, 0):
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    else:
        shape, fortran_order, dtype = np.lib.format.read_array_header_2_0(stream)
    if dtype != np.uint8 or fortran_order or not (len(shape) == 3 or (len(shape) == 4 and shape[3] == 3)):
        return None
    pictures = Pictures(path, member, stream.tell(), shape)
    if size - pictures.offset != math.prod(shape):
        rule = f"must hold {' x '.join(map(str, shape))} bytes"
        found = f"{path}: {size - pictures.offset:,} bytes of pixels in {pictures.name}"
        raise UserError(found, rule, "fetch the file again")
    return pictures
