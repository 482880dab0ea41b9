"""Writes the report of examples/reproduce_small.sh, with its tables, curves and pictures.

python tools/report_reproduction.py --run runs/reproduction --output docs/results.md
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_codec.errors import run_tool
from megatron_codec.evaluation.reproduction import write_reproduction


@dataclass(frozen=True)
class Arguments:
    """Writes the report; its pictures go into the folder `images` beside it."""

    run: Path
    """Folder of examples/reproduce_small.sh."""
    output: Path
    """The Markdown file to write."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    for sentence in write_reproduction(arguments.run, arguments.output):
        print(sentence)
    print(f"see {arguments.output}")


if __name__ == "__main__":
    run_tool(main)
