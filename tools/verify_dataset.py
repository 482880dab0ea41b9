"""Checks that datasets are whole, and names file, document and byte of the first fault of each.

python tools/verify_dataset.py data/train data/test
python tools/verify_dataset.py data/train --decode
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from megatron_codec.errors import UserError, collecting, raise_all, run_tool
from megatron_codec.preprocessing.verify import verify_dataset


@dataclass(frozen=True)
class Arguments:
    """Checks sizes, checksums and index of datasets, and that each document is BOS, known ids, EOS."""

    prefixes: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Paths of the datasets, without an ending."""
    decode: bool = False
    """Also decode every document, and encode its bytes again to compare the ids."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    if not arguments.prefixes:
        raise UserError("no dataset", "give the prefix of at least one")
    faults: list[UserError] = []
    for prefix in arguments.prefixes:
        with collecting(faults):
            started = time.monotonic()
            manifest = verify_dataset(prefix, arguments.decode)
            seconds = time.monotonic() - started
            size = sum(shard.bin_bytes + shard.idx_bytes for shard in manifest.shards)
            size += Path(f"{prefix}.json").stat().st_size
            print(
                f"{prefix}: {manifest.documents:,} documents, {manifest.tokens:,} tokens, "
                f"{size:,} bytes checked, {size / seconds / 1e6:,.1f} MB/s"
                + (", every document decodes" if arguments.decode else "")
            )
    raise_all(faults)


if __name__ == "__main__":
    run_tool(main)
