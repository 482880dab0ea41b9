"""Writes docs/megatron_flags.md, what a script ported from Megatron-LM can keep, from the tables.

python -m megatron_codec.flags.page > docs/megatron_flags.md
"""

from collections.abc import Iterator

from megatron_codec.flags.megatron import TOPICS
from megatron_codec.flags.megatron_flag import MegatronFlag, Table

HEAD = """\
# Flags of Megatron-LM

Flags of `tools/pretrain.py` have the names and the meaning of Megatron-LM's, so a script ported from there
keeps them; `python tools/pretrain.py --help` lists them all. A hyphen and an underscore are the same.
Defaults are those of `--preset`, not Megatron-LM's. What Megatron-LM has and this project has not is told
apart from a misspelt flag:

- A flag that asks for what happens here anyway is accepted, and the first process says once that it changed
  nothing.
- Any other is refused with the reason and with what to use instead, in one message with all other faults of
  the command line, exit status 2, before torch is imported.

In that message are also: flags that do not exist, with the nearest that do; values of a wrong type, or too
many; flags of `--dry-run` without it; faults of the other values (layout, batch, schedule, ...) for
WORLD_SIZE processes, which torchrun sets, else for one; and datasets that are missing, damaged or made with
different tokenizers. What would only follow from a faulty flag is left out: with
`--tensor-model-parallel-size many` nothing is said of the batch, and with an unknown `--preset` of no
value. Not in it is what is wrong with `--load`: to read a checkpoint takes torch, so that is told once the
flags are right.

What a name with `*` says holds for all flags that begin so. This page is written by

    python -m megatron_codec.flags.page > docs/megatron_flags.md
"""


def page() -> str:
    """The page as Markdown, with a final newline."""
    lines = [HEAD, "## Accepted with these values", "", "| flag | value | because |", "|---|---|---|"]
    lines += [
        f"| `{name}` | {_values(flag)} | {flag.reason} |"
        for table in TOPICS.values()
        for name, flag in table.items()
        if flag.same
    ]
    lines += ["", "Any other value of these is refused.", "", "## Refused"]
    for topic, table in TOPICS.items():
        lines += ["", f"### {topic}", "", "| flags | because | instead |", "|---|---|---|", *_refused(table)]
    return "\n".join(lines) + "\n"


def _values(flag: MegatronFlag) -> str:
    return "none" if flag.same == ("",) else " or ".join(f"`{value}`" for value in flag.same)


def _refused(table: Table) -> Iterator[str]:
    """A row for each reason."""
    rows: dict[tuple[str, str], list[str]] = {}
    for name, flag in table.items():
        if not flag.same:
            rows.setdefault((flag.reason, flag.remedy), []).append(f"`{name}`")
    for (reason, remedy), names in rows.items():
        yield f"| {' '.join(names)} | {reason} | {remedy} |"


if __name__ == "__main__":
    print(page(), end="")
