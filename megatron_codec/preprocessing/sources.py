"""Where pictures come from: folders, files, lists of files, and arrays in the idx format.

Every source is a sequence of pictures with names. A picture's name does not depend on where its folder
lies, so that `held_out` decides alike on every machine. A new kind of source is one more class with the
methods of `Source` and one more case in `_open`.
"""

import gzip
import hashlib
import math
import os
import zlib
from collections.abc import Iterable, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from typing import Literal, Protocol, get_args

import numpy as np
from PIL import Image

from megatron_codec.errors import UserError

Subset = Literal["all", "train", "test"]

LIST_SUFFIXES = (".txt", ".lst")
# Pillow would run Ghostscript for the first; the others it identifies but cannot decode.
_EXCLUDED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}
_IDX_MAGIC = (b"\x00\x00\x08\x03", b"\x00\x00\x08\x04")  # unsigned bytes in 3 or 4 dimensions


class Source(Protocol):
    """A sequence of pictures."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The picture's name within its source."""
        ...

    def label(self, index: int) -> str:
        """Where the picture is, for messages."""
        ...

    def load(self, index: int) -> Image.Image | np.ndarray:
        """The picture, decoded. Raises whatever Pillow does if it is broken."""
        ...

    def take(self, indices: np.ndarray) -> "Source":
        """Only these pictures; ascending indices, int64 [n]."""
        ...


class FileSource:
    """Picture files below a folder."""

    def __init__(self, folder: Path, names: list[str]):
        self._folder, self._names = folder, names

    def __len__(self) -> int:
        return len(self._names)

    def name(self, index: int) -> str:
        return self._names[index]

    def label(self, index: int) -> str:
        return str(self._folder / self._names[index])

    def load(self, index: int) -> Image.Image:
        with Image.open(self._folder / self._names[index], formats=_formats()) as image:
            image.load()
            return image

    def take(self, indices: np.ndarray) -> "FileSource":
        return FileSource(self._folder, [self._names[i] for i in indices])


class IdxSource:
    """Grey or RGB pictures in an idx file, the format of MNIST, gzipped or not."""

    def __init__(self, path: Path, pictures: np.ndarray, indices: np.ndarray):
        self._path, self._pictures, self._indices = path, pictures, indices

    def __reduce__(self):  # without the pictures, which every process maps or unpacks for itself
        return IdxSource.open, (self._path, self._indices)

    @classmethod
    def open(cls, path: Path, indices: np.ndarray | None = None) -> "IdxSource":
        """The pictures of a file (all, or those of these indices). Raises UserError if it is damaged."""
        try:
            if _is_gzip(path):
                content = np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8)
            else:
                content = np.memmap(path, np.uint8, "r").view(np.ndarray)
        except (OSError, EOFError, zlib.error) as error:
            raise UserError(f"{path}", f"cannot be read: {error}", "fetch the file again") from error
        header = 4 + 4 * int(content[3])
        shape = [int.from_bytes(content[i : i + 4].tobytes(), "big") for i in range(4, header, 4)]
        found = len(content) - header
        if found != math.prod(shape) or shape[3:] not in ([], [3]):
            rule = f"must hold {' x '.join(map(str, shape))} bytes (grey, or 3 channels last)"
            raise UserError(f"{path}: {max(0, found):,} bytes of pixels", rule, "fetch the file again")
        pictures = content[header:].reshape(shape)
        return cls(path, pictures, np.arange(len(pictures)) if indices is None else indices)

    def __len__(self) -> int:
        return len(self._indices)

    def name(self, index: int) -> str:
        return f"{self._path.name.removesuffix('.gz')}[{self._indices[index]}]"

    def label(self, index: int) -> str:
        return f"{self._path}[{self._indices[index]}]"

    def load(self, index: int) -> np.ndarray:
        return self._pictures[self._indices[index]]

    def take(self, indices: np.ndarray) -> "IdxSource":
        return IdxSource(self._path, self._pictures, self._indices[indices])


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = [source for source in sources if len(source)]
        self._ends = np.array(list(accumulate(map(len, self._sources))), np.int64)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def _locate(self, index: int) -> tuple[Source, int]:
        place = int(np.searchsorted(self._ends, index, side="right"))
        return self._sources[place], index - (int(self._ends[place - 1]) if place else 0)

    def name(self, index: int) -> str:
        source, index = self._locate(index)
        return source.name(index)

    def label(self, index: int) -> str:
        source, index = self._locate(index)
        return source.label(index)

    def load(self, index: int) -> Image.Image | np.ndarray:
        source, index = self._locate(index)
        return source.load(index)

    def take(self, indices: np.ndarray) -> "JoinedSource":
        cuts = np.searchsorted(indices, self._ends[:-1]) if len(self._ends) else []
        begins = [0, *self._ends[:-1]]
        parts = zip(self._sources, np.split(indices, cuts), begins, strict=False)
        return JoinedSource([source.take(part - begin) for source, part, begin in parts])


def open_pictures(
    inputs: Iterable[str | os.PathLike],
    subset: Subset = "all",
    hold_out: float = 0.0,
    limit: int | None = None,
) -> Source:
    """The pictures of all inputs, in the order of the inputs, folders sorted by name.

    Args:
        inputs: folders (searched recursively, links to folders not followed), picture files, lists
            (`.txt` or `.lst`, one path a line, relative to the list), idx arrays.
        subset: `train` leaves out the share `hold_out` of the pictures, `test` takes that share alone.
            The hash of a picture's name decides (`held_out`).
        limit: at most so many pictures, evenly spread over all.

    Raises UserError for an input that does not exist or has no pictures, and for an empty result.
    """
    inputs = [Path(path) for path in inputs]
    if not inputs:
        raise UserError("--input", "must name at least one folder or file")
    if subset not in get_args(Subset):
        raise UserError(f"subset '{subset}'", f"must be one of {', '.join(get_args(Subset))}")
    if not 0 <= hold_out < 1 or (subset == "test" and hold_out == 0):
        rule = "must be at least 0 and below 1, and above 0 for the subset 'test'"
        raise UserError(f"--hold-out {hold_out}", rule, "0.1 holds out a tenth of the pictures")
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit}", "must be at least 1")
    pictures = JoinedSource([_open(path) for path in inputs])
    if not len(pictures):
        raise UserError(f"--input {' '.join(map(str, inputs))}", "holds no pictures")
    if subset != "all":
        chosen = [held_out(pictures.name(i), hold_out) == (subset == "test") for i in range(len(pictures))]
        pictures = pictures.take(np.flatnonzero(chosen))
        if not len(pictures):
            rule = f"none of the pictures falls into the subset '{subset}'"
            raise UserError(f"--hold-out {hold_out}", rule, "give more pictures or another share")
    if limit is not None and limit < len(pictures):
        pictures = pictures.take(np.arange(limit) * len(pictures) // limit)
    return pictures


def held_out(name: str, share: float) -> bool:
    """Whether a picture of this name belongs to the held-out share; the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _open(path: Path) -> Source:
    if path.is_dir():
        return FileSource(path, _find_pictures(path))
    if not path.is_file():
        raise UserError(f"{path}", "there is no such file or folder")
    if path.suffix.lower() in LIST_SUFFIXES:
        lines = [line.strip() for line in path.read_text("utf-8", "surrogateescape").splitlines()]
        names = [line for line in lines if line]
        if not names:
            raise UserError(f"{path}", "must name one picture a line")
        return FileSource(path.parent, names)
    with (gzip.open if _is_gzip(path) else open)(path, "rb") as file:
        is_idx = file.read(4) in _IDX_MAGIC
    return IdxSource.open(path) if is_idx else FileSource(path.parent, [path.name])


def _find_pictures(folder: Path) -> list[str]:
    suffixes = {suffix for suffix, form in Image.registered_extensions().items() if form in _formats()}
    names, others = [], 0
    for parent, folders, files in os.walk(folder, onerror=_unreadable):
        folders.sort()
        for file in sorted(files):
            if not file.startswith(".") and os.path.splitext(file)[1].lower() in suffixes:
                names.append(Path(parent, file).relative_to(folder).as_posix())
            else:
                others += 1
    if not names:
        remedy = "check the path; pictures are known by their endings (.jpg, .png, .webp, ...)"
        raise UserError(f"{folder}", f"holds no pictures ({others} other files)", remedy)
    return names


def _unreadable(error: OSError) -> None:
    raise UserError(f"{error.filename}", f"cannot be searched: {error.strerror}", "mend its permissions")


@cache
def _formats() -> tuple[str, ...]:
    """Formats that are opened."""
    Image.init()
    return tuple(form for form in Image.ID if form not in _EXCLUDED_FORMATS)


def _is_gzip(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(2) == b"\x1f\x8b"
