"""Where pictures and videos come from: folders, files, lists of files, tar files, arrays.

A new kind of source is one more class with the methods of `base.Source` and one more case in `_open`.
"""

import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, get_args

from megatron_codec.errors import UserError
from megatron_codec.preprocessing.sources.arrays import (
    IDX_MAGIC,
    NPY_MAGIC,
    NPZ_MAGIC,
    is_gzip,
    magic,
    open_arrays,
)
from megatron_codec.preprocessing.sources.base import (
    Item,
    JoinedSource,
    Source,
    SpreadSource,
    Subset,
    SubsetSource,
    UnusableError,
    held_out,
)
from megatron_codec.preprocessing.sources.files import FileSource, Names, repeated_names, walk
from megatron_codec.preprocessing.sources.tar import SUFFIXES as TAR_SUFFIXES
from megatron_codec.preprocessing.sources.tar import TarSource

__all__ = ["Item", "Selection", "Source", "Subset", "UnusableError", "held_out", "open_inputs"]

LIST_SUFFIXES = (".txt", ".lst")
_ENDINGS = {"pictures": ".jpg, .png, .webp", "videos": ".mp4, .mkv, .webm"}


@dataclass(frozen=True)
class Selection:
    """Which of the inputs' items are taken.

    Args:
        inputs: folders (searched recursively, links to folders not followed), files, lists (`.txt` or
            `.lst`, one path a line, relative to the list), tar files, arrays (idx, .npy, .npz).
        subset: `train` leaves out the share `hold_out` of the items, `test` takes that share alone. The
            hash of an item's name decides (`held_out`).
        limit: at most so many items, evenly spread over all.

    Raises UserError for a subset, share or limit that makes no sense.
    """

    inputs: tuple[Path, ...]
    subset: Subset = "all"
    hold_out: float = 0.0
    limit: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", tuple(map(Path, self.inputs)))
        if not self.inputs:
            raise UserError("--input", "must name at least one folder or file")
        if self.subset not in get_args(Subset):
            raise UserError(f"subset '{self.subset}'", f"must be one of {', '.join(get_args(Subset))}")
        if not 0 <= self.hold_out < 1 or (self.subset == "test" and self.hold_out == 0):
            rule = "must be at least 0 and below 1, and above 0 for the subset 'test'"
            raise UserError(f"--hold-out {self.hold_out}", rule, "0.1 holds out a tenth")
        if self.limit is not None and self.limit < 1:
            raise UserError(f"--limit {self.limit}", "must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        """JSON values, for the manifest."""
        return asdict(self) | {"inputs": [str(path) for path in self.inputs]}


def open_inputs(
    selection: Selection, suffixes: frozenset[str], spool: Path, things: str = "pictures"
) -> Source:
    """The items of all inputs, in the order of the inputs.

    Args:
        suffixes: endings of the files that are wanted, lower case, with the dot.
        spool: a folder for lists of names; they are needed as long as the source is used.
        things: what the items are called in messages.

    Raises UserError for an input that does not exist or has no items, and for an empty result.
    """
    opener = _Opener(suffixes, spool, things)
    sources: list[Source] = []
    for (parent, plain), paths in groupby(selection.inputs, lambda path: (path.parent, _is_plain(path))):
        if plain:  # the shell's photos/*.jpg
            sources.append(opener.files(parent, [path.name for path in paths]))
        else:
            sources += [part for path in paths for part in opener.open(path)]
    source: Source = JoinedSource(sources)
    if next(iter(source), None) is None:
        raise UserError(f"--input {' '.join(map(str, selection.inputs))}", f"holds no {things}")
    if selection.subset != "all":
        source = SubsetSource(source, selection.hold_out, selection.subset == "test")
        if next(iter(source), None) is None:
            rule = f"none of the {things} falls into the subset '{selection.subset}'"
            raise UserError(f"--hold-out {selection.hold_out}", rule, f"give more {things} or another share")
    return source if selection.limit is None else SpreadSource(source, selection.limit)


class _Opener:
    def __init__(self, suffixes: frozenset[str], spool: Path, things: str):
        self._suffixes, self._spool, self._things, self._lists = suffixes, spool, things, 0

    def open(self, path: Path) -> list[Source]:
        """The sources of one input that is no plain file."""
        if path.is_dir():
            return self._folder(path)
        if not path.is_file():
            raise UserError(f"{path}", "there is no such file or folder")
        if _is_tar(path.name):
            return [TarSource(path, self._suffixes)]
        if path.suffix.lower() in LIST_SUFFIXES:
            return self._list(path)
        return list(open_arrays(path))

    def files(self, folder: Path, names: list[str]) -> Source:
        """Plain files of one folder."""
        return FileSource(folder, self._names(names))

    def _folder(self, folder: Path) -> list[Source]:
        tars, others = [], 0

        def wanted() -> Iterator[str]:
            nonlocal others
            for name in walk(folder):
                if os.path.splitext(name)[1].lower() in self._suffixes:
                    yield name
                elif _is_tar(name):
                    tars.append(name)
                else:
                    others += 1

        names = self._names(wanted())
        if not len(names) and not tars:
            endings = _ENDINGS.get(self._things) or ", ".join(sorted(self._suffixes)[:3])
            remedy = f"check the path; {self._things} are known by their endings ({endings}, ...)"
            raise UserError(f"{folder}", f"holds no {self._things} ({others} other files)", remedy)
        found: list[Source] = [FileSource(folder, names)] if len(names) else []
        return found + [TarSource(folder / name, self._suffixes) for name in tars]

    def _list(self, path: Path) -> list[Source]:
        def lines() -> Iterator[str]:
            with open(path, encoding="utf-8", errors="surrogateescape") as file:
                yield from (line for line in map(str.strip, file) if line)

        found: list[Source] = []
        for are_tars, names in groupby(lines(), _is_tar):
            if are_tars:
                for name in names:
                    if not (path.parent / name).is_file():
                        raise UserError(f"{path.parent / name}", f"is named in {path} and does not exist")
                    found.append(TarSource(path.parent / name, self._suffixes))
            else:
                written = self._names(names)
                found.append(FileSource(path.parent, written, repeated_names(written)))
        if not found:
            raise UserError(f"{path}", f"must name one {self._things[:-1]} a line")
        return found

    def _names(self, names: Iterable[str]) -> Names:
        self._lists += 1
        return Names.write(self._spool / f"{self._lists}", names)


def _is_plain(path: Path) -> bool:
    """Whether an input is a picture or video itself, as far as its name and its first bytes say."""
    if not path.is_file() or _is_tar(path.name) or path.suffix.lower() in LIST_SUFFIXES:
        return False
    try:
        return magic(path) not in (*IDX_MAGIC, NPY_MAGIC, NPZ_MAGIC) and not is_gzip(path)
    except OSError:  # whoever reads it says why it cannot be read
        return True


def _is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIXES)
