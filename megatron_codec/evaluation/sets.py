"""Picture sets and what was computed of them, in the output folder under the hash of all that decides them.

    OUTPUT/sets/NAME-KEY/           the files of the pictures, set.json
    OUTPUT/sets/NAME-KEY.partial/   the same of a set that is being made, and part-START.json of each part
    OUTPUT/cache/WHAT-KEY.*         features, numbers

Each appears whole or not at all, so a run that is stopped goes on with what is finished, and a change of
whatever decides the pictures (pixels, weights, sampling; each completer's `identity` says what) is another
key.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation.samples import BROKEN, Sample
from megatron_codec.files import whole_file, write_json

_FORMAT = 3  # to be raised when the same key would stand for something else
_GREY = 128


@dataclass(frozen=True)
class PictureSet:
    """Completed pictures in a folder.

    Attributes:
        folder: of the files.
        key: hash of what decides them.
        files: their names, in the order of the originals.
        numbers: of each, what its completer told.
    """

    folder: Path
    key: str
    files: tuple[str, ...]
    numbers: tuple[dict[str, Any], ...]

    def picture(self, number: int) -> Image.Image | None:
        """One of them, or None where it does not decode."""
        path = self.folder / self.files[number]
        if path.suffix == BROKEN:
            return None
        try:
            with Image.open(path) as picture:
                return picture.convert("RGB")
        except (OSError, SyntaxError, ValueError) as error:
            rule = f"cannot be read: {error}"
            raise UserError(f"{path}", rule, f"remove {self.folder}; it is made again") from error

    def pixels(self, size: int) -> np.ndarray:
        """uint8 [n, size, size, 3]; those that do not decode are grey."""
        grey = Image.new("RGB", (size, size), (_GREY,) * 3)
        return np.stack([np.asarray(self.picture(number) or grey) for number in range(len(self.files))])


# The sets of a row of the tables, a seed each: by the completer's name and the prompt ratio.
Made = dict[tuple[str, float], list[PictureSet]]


def key_of(value: Any) -> str:
    """The first 16 digits of the SHA-256 of JSON values."""
    text = json.dumps([_FORMAT, value], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class Sets:
    """What an output folder holds."""

    def __init__(self, output: Path):
        self.output = output

    def folder(self, name: str, key: str) -> Path:
        """Where a set lies, or will. `name` is for people; the key alone says which it is."""
        for found in (self.output / "sets").glob(f"*-{key}*"):
            return found.with_name(found.name.removesuffix(".partial"))
        plain = re.sub(r"[^a-z0-9.]+", "-", name.lower()).strip("-")
        return self.output / "sets" / f"{plain[:60]}-{key}"

    def has(self, name: str, key: str) -> bool:
        """Whether a set is finished."""
        return (self.folder(name, key) / "set.json").is_file()

    def has_part(self, name: str, key: str, numbers: range) -> bool:
        """Whether a part of a set that is not finished is there."""
        return self._part(name, key, numbers.start).is_file()

    def write_part(self, name: str, key: str, numbers: range, samples: Sequence[Sample]) -> None:
        """Writes a part of a set: the samples of these originals."""
        record = self._part(name, key, numbers.start)
        record.parent.mkdir(parents=True, exist_ok=True)
        files = [f"{number:05d}{sample.suffix}" for number, sample in zip(numbers, samples, strict=True)]
        for file, sample in zip(files, samples, strict=True):
            with open(record.parent / file, "wb") as stream:
                stream.write(sample.content)
                stream.flush()
                os.fsync(stream.fileno())  # before the record, which says that it is there
        # The part counts when its record is there; what was written of a part without one is overwritten.
        write_json(record, {"files": files, "numbers": [sample.numbers for sample in samples]})

    def finish(self, name: str, key: str, identity: Any) -> None:
        """Makes a set of its parts, all of which are there."""
        partial = self._part(name, key, 0).parent
        records = sorted(partial.glob("part-*.json"))
        parts = [json.loads(record.read_text(encoding="utf-8")) for record in records]
        whole: dict[str, Any] = {"identity": identity}
        for what in ("files", "numbers"):
            whole[what] = [one for part in parts for one in part[what]]
        # Of a run with other suffixes or a temporary name, stopped within a part.
        for file in partial.iterdir():
            if file.name not in whole["files"] and file not in records:
                file.unlink()
        write_json(partial / "set.json", whole)
        for record in records:
            record.unlink()
        os.replace(partial, self.folder(name, key))

    def _part(self, name: str, key: str, start: int) -> Path:
        folder = self.folder(name, key)
        return folder.with_name(f"{folder.name}.partial") / f"part-{start:09d}.json"

    def read(self, name: str, key: str) -> PictureSet:
        """A set that is there.

        Raises:
            UserError: its description is damaged.
        """
        folder = self.folder(name, key)
        try:
            record = json.loads((folder / "set.json").read_text(encoding="utf-8"))
            return PictureSet(folder, key, tuple(record["files"]), tuple(record["numbers"]))
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = f"cannot be read: {error}"
            raise UserError(f"{folder / 'set.json'}", rule, f"remove {folder}; it is made again") from error

    def array(self, what: str, key: Any, make: Callable[[], np.ndarray]) -> np.ndarray:
        """An array from the cache, or made and put there."""
        path = self._path(what, key, ".npy")
        if not path.exists():
            array = make()
            with whole_file(path) as stream:
                np.save(stream, array)
        try:
            return np.load(path)
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def json(self, what: str, key: Any, make: Callable[[], Any]) -> Any:
        """JSON values from the cache, or made and put there."""
        path = self._path(what, key, ".json")
        if not path.exists():
            write_json(path, make())
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _damaged(path, error) from error

    def has_json(self, what: str, key: Any) -> bool:
        """Whether `json` has nothing to make."""
        return self._path(what, key, ".json").exists()

    def _path(self, what: str, key: Any, suffix: str) -> Path:
        return self.output / "cache" / f"{what}-{key_of(key)}{suffix}"


def _damaged(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}", f"cannot be read: {error}", "remove it; it is made again")
