"""What the tables of Megatron-LM's flags are made of."""

from dataclasses import dataclass
from typing import Literal

Takes = Literal["none", "one", "several"]


@dataclass(frozen=True)
class MegatronFlag:
    """A flag of Megatron-LM that is not one here, and is told apart from a misspelt one.

    Attributes:
        takes: how many values it takes in Megatron-LM.
        reason: why it is not a flag here.
        remedy: what to do instead.
        same: the values that ask for what happens here anyway, "" for a flag without a value; empty where
            there are none.
    """

    takes: Takes
    reason: str
    remedy: str = "leave it out"
    same: tuple[str, ...] = ()

    def cut(self, values: list[str]) -> tuple[list[str], list[str]]:
        """What stands behind the flag, as its own values and those that are too many."""
        most = {"none": 0, "one": 1, "several": len(values)}[self.takes]
        return values[:most], values[most:]

    def changes_nothing(self, values: list[str]) -> bool:
        """Whether the flag asks with these values for what happens anyway; numbers compare as numbers."""
        return any(_equal(" ".join(values), same) for same in self.same)


Table = dict[str, MegatronFlag]  # a name that ends in * stands for all that begin so


def refused(
    reason: str,
    remedy: str = "leave it out",
    *,
    none: str = "",
    one: str = "",
    several: str = "",
    family: str = "",
) -> Table:
    """Flags with one reason.

    Args:
        none, one, several: names of those that take so many values.
        family: how the names of others begin; what stands behind one of them is taken to be its own.
    """
    several += "".join(f" {start}*" for start in family.split())
    named: dict[Takes, str] = {"none": none, "one": one, "several": several}
    return {
        f"--{name}": MegatronFlag(takes, reason, remedy)
        for takes, names in named.items()
        for name in names.split()
    }


def granted(reason: str, *, none: str = "", **same: str) -> Table:
    """Flags that are accepted where they ask for what happens anyway.

    Args:
        none: names of flags without a value.
        same: a flag with underscores, and the accepted values with blanks between them.
    """
    table = {f"--{name}": MegatronFlag("none", reason, same=("",)) for name in none.split()}
    for name, values in same.items():
        table[f"--{name.replace('_', '-')}"] = MegatronFlag("one", reason, same=tuple(values.split()))
    return table


def _equal(given: str, same: str) -> bool:
    try:
        return float(given) == float(same)
    except ValueError:
        return given == same
