"""Items that give no stream: why, how many may be lost, and what the manifest says of them."""

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron_codec.errors import UserError
from megatron_codec.files import whole_file
from megatron_codec.preprocessing.sources import Item, UnusableError

NAMED = 100  # skipped items that the manifest itself names
_ENOUGH = 1000  # items before a share is judged


@dataclass(frozen=True)
class Skipped:
    """An item that gave no stream.

    Args:
        name: where it is.
        kind: a few words that are the same for all faults of the kind.
        reason: what is wrong with this one.
    """

    name: str
    kind: str
    reason: str

    @classmethod
    def because(cls, item: Item, error: Exception) -> "Skipped":
        """For an item that an exception was raised about."""
        kinds = {PermissionError: "no permission", FileNotFoundError: "missing", UserError: "unfit"}
        kind = kinds.get(type(error), "truncated or damaged")
        if isinstance(error, UnusableError):
            kind = error.kind
        reason = (
            str(error) if isinstance(error, UnusableError | UserError) else f"{type(error).__name__}: {error}"
        )
        return cls(item.label, kind, reason)


@dataclass(frozen=True)
class SkipLimit:
    """How many items may be skipped before a run stops.

    Args:
        text: a number ("100"), or a share of the items so far ("1%"), judged from the thousandth item on and
            at the end.

    Raises UserError for anything else.
    """

    text: str

    def __post_init__(self) -> None:
        try:
            valid = self._value >= 0 and not (self._is_share and self._value > 100)
        except ValueError:
            valid = False
        if not valid:
            rule = "must be a number of items or a share of them"
            raise UserError(f"--max-skipped {self.text}", rule, "for instance 100 or 1%")

    @property
    def _is_share(self) -> bool:
        return self.text.endswith("%")

    @property
    def _value(self) -> float:
        return float(self.text[:-1]) if self._is_share else int(self.text)

    def check(self, items: int, skipped: int, things: str = "pictures", finished: bool = False) -> None:
        """Raises UserError if so many of so many items, which are called `things`, are too many."""
        if self._is_share:
            too_many = (finished or items >= _ENOUGH) and skipped > items * self._value / 100
        else:
            too_many = skipped > self._value
        if too_many:
            rule = f"more than --max-skipped {self.text}"
            remedy = "see why with --max-skipped 100% and the manifest; the same command goes on where it was"
            raise UserError(f"{skipped:,} of {items:,} {things} were skipped", rule, remedy)


def skipped_summary(skipped: Sequence[Skipped], path: Path, scratch: Path) -> dict[str, Any]:
    """`Manifest.skipped`; writes all of them to `path`, a JSON object a line, if they are more than 100.

    `scratch` is a folder for temporary files.
    """
    kinds = sorted(Counter(entry.kind for entry in skipped).items())
    summary = {"count": len(skipped), "reasons": dict(kinds), "first": list(map(asdict, skipped[:NAMED]))}
    if len(skipped) > NAMED:
        with whole_file(path, "w", scratch=scratch) as file:
            file.writelines(json.dumps(asdict(entry)) + "\n" for entry in skipped)
        summary["file"] = path.name
    return summary


def nothing_readable(first: Skipped, count: int, things: str) -> UserError:
    """The error for inputs in which not one item can be read."""
    rule = f"none of them can be read, first {first.name} ({first.reason})"
    return UserError(f"--input: {count} {things}", rule)
