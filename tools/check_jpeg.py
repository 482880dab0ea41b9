"""Says whether JPEG files are strictly valid, and if not which byte, which MCU and which rule.

    python tools/check_jpeg.py samples cat.jpg
    python tools/check_jpeg.py --canonical --in-range samples

Ends with status 1 when a file is not valid. Files are whole ones, as `tools/generate.py` writes them and any
viewer opens; an abbreviated stream, which has no tables, is for `JpegCodec.check`, which knows them.
docs/grammar.md says what strict means.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from megatron_codec.codecs.jpeg_check import check_files, find_files
from megatron_codec.errors import UserError, run_tool


@dataclass(frozen=True)
class Arguments:
    """Says of JPEG files whether they are strictly valid; status 1 if one is not."""

    files: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Files, and folders to be searched for .jpg, .jpeg, .jpe and .jfif."""
    canonical: bool = False
    """Also refuse runs of zeros that no coefficient follows in its block: re-encoding gives other bytes."""
    in_range: bool = False
    """Also refuse coefficients that no picture of 8-bit samples has."""
    quiet: bool = False
    """Name only files that are not valid."""


def main() -> int:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    if not arguments.files:
        raise UserError("no file", "give at least one, or a folder")
    files, wrong = find_files(arguments.files), 0
    verdicts = check_files(files, arguments.canonical, arguments.in_range)
    with tqdm(verdicts, "checking", len(files), disable=len(files) < 2, leave=False) as bar:
        for path, report in bar:
            wrong += not report.valid
            place = "" if report.offset is None else f"byte {report.offset}: "
            if not report.valid or not arguments.quiet:
                bar.write(f"{path}: {'valid' if report.valid else place + report.reason}")
    print(f"{len(files):,} files, {wrong:,} not valid")
    return int(wrong > 0)


if __name__ == "__main__":
    run_tool(main)
