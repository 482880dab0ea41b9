"""Writes the report of a run: report.md with loss.png and samples.png, from what the other tools left.

python tools/report.py --run runs/quickstart
"""

from dataclasses import dataclass
from pathlib import Path

import tyro

from megatron_codec.errors import run_tool
from megatron_codec.evaluation.run_report import write_report


@dataclass(frozen=True)
class Arguments:
    """Writes RUN/report.md."""

    run: Path
    """Folder of a run of examples/quickstart.sh."""


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    numbers = write_report(arguments.run)
    print(
        f"held out: {numbers['held_out_nats_per_token']:.3f} nats a token, "
        f"{numbers['held_out_bits_per_payload_byte']:.3f} bits a byte of payload\n"
        f"a unigram model of the same tokens: {numbers['unigram_nats_per_token']:.3f} nats a token, "
        f"ours is {numbers['below_unigram']:.1%} below it\n"
        f"{numbers['share_that_decodes']:.1%} of {numbers['samples']} samples decode\n"
        f"see {arguments.run / 'report.md'}, {arguments.run / 'samples.png'}"
    )


if __name__ == "__main__":
    run_tool(main)
