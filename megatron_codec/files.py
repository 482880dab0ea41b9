"""Output files and folders that appear whole: written under a temporary name, flushed to disk, renamed."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any


@contextlib.contextmanager
def whole_file(
    path: str | os.PathLike, mode: str = "wb", *, scratch: str | os.PathLike | None = None
) -> Iterator[IO[Any]]:
    """Opens a file that takes its name only when the block ends without an exception.

    A reader, or a run that is stopped at any moment, sees the old file or the new one, never a part.

    Args:
        scratch: the folder of the temporary file, for a caller that clears that folder in the end: what
            SIGKILL leaves goes with it. It must exist, on the same file system. By default the file's own.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Tasks on several machines may write the same file, and in containers have the same process number.
    temporary = Path(scratch or path.parent) / f".{path.name}.{os.urandom(8).hex()}.tmp"
    try:
        with open(temporary, mode, encoding=None if "b" in mode else "utf-8") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_folder(path: str | os.PathLike) -> Iterator[Path]:
    """Gives a folder to write into, which takes its name only when the block ends without an exception.

    Args:
        path: a name that is free, or of an empty folder. Else an OSError comes at the end.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.urandom(8).hex()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        for file in filter(Path.is_file, temporary.rglob("*")):
            with open(file, "rb") as stream:
                os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: str | os.PathLike, value: Any) -> None:
    """Writes `value` as indented JSON, whole."""
    with whole_file(path, "w") as stream:
        json.dump(value, stream, indent=1)
        stream.write("\n")
