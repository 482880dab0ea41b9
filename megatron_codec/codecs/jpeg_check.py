"""Verdicts on many JPEG files, for tools/check_jpeg.py.

for path, report in check_files(find_files([Path("samples")])):
    print(path, report)
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from megatron_codec.codecs.base import Report
from megatron_codec.codecs.jpeg_format import check_file
from megatron_codec.errors import UserError, raise_all

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif")  # of the files that a folder is searched for, in any case


def find_files(paths: Sequence[Path]) -> list[Path]:
    """The files among these paths as they are, and the JPEG files below the folders among them, by name.

    Raises:
        UserError: a path does not exist, or a folder holds no file with one of `SUFFIXES`.
    """
    found: list[Path] = []
    faults: list[UserError] = []
    for path in paths:
        if not path.is_dir():
            found.append(path)
            if not path.exists():
                faults.append(UserError(f"{path}", "does not exist"))
            continue
        below = [
            Path(folder, name)
            for folder, _, names in os.walk(path)
            for name in names
            if name.lower().endswith(SUFFIXES)
        ]
        if not below:
            faults.append(UserError(f"{path}", f"holds no file named {', '.join(SUFFIXES)}"))
        found += sorted(below)
    raise_all(faults)
    return found


def check_files(
    paths: Iterable[Path], canonical: bool = False, in_range: bool = False
) -> Iterator[tuple[Path, Report]]:
    """Each file with the verdict of `jpeg_format.check_file`; one that cannot be read is not valid."""
    for path in paths:
        try:
            report = check_file(path.read_bytes(), canonical, in_range)
        except OSError as error:
            report = Report(False, f"cannot be read: {error.strerror}")
        yield path, report
