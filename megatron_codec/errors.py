"""Errors that a user can act on: which value, which rule, what to do.

    raise UserError("--image-size 250", "must be a multiple of 16", "use 240 or 256")

prints, through `run_tool`, one readable message and no traceback, and exits with status 2.
"""

import contextlib
import math
import os
import sys
from collections.abc import Callable, Iterator


class UserError(ValueError):
    """A fault that the user can mend.

    Args:
        value: the offending value, with its name (`--image-size 250`, `photos/a.jpg`).
        rule: what it has to satisfy.
        remedy: what to do about it.
    """

    def __init__(self, value: str, rule: str, remedy: str = ""):
        self.value, self.rule, self.remedy = value, rule, remedy
        super().__init__(f"{value}: {rule}" + (f"; {remedy}" if remedy else ""))

    def __reduce__(self):  # exceptions travel between worker processes
        return type(self), (self.value, self.rule, self.remedy)


class UserErrors(UserError):
    """All the faults of one command line, reported at once."""

    def __init__(self, faults: list[UserError]):
        self.faults = faults
        super().__init__(f"{len(faults)} faults", "\n".join(f"  - {fault}" for fault in faults))

    def __reduce__(self):
        return type(self), (self.faults,)

    def __str__(self) -> str:
        return "\n".join(str(fault) for fault in self.faults)


def raise_all(faults: list[UserError]) -> None:
    """Raises nothing, the only fault, or all of them as one `UserErrors`."""
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise UserErrors(faults)


@contextlib.contextmanager
def collecting(faults: list[UserError]) -> Iterator[None]:
    """Adds the faults that the block raises to `faults`, so that the next check can add its own."""
    try:
        yield
    except UserErrors as several:
        faults += several.faults
    except UserError as fault:
        faults.append(fault)


def out_of_range(config: object, least: int, *names: str, below: float = math.inf) -> Iterator[UserError]:
    """Those of the fields that are set, and not to a number of at least `least` and below `below`."""
    for name in names:
        value = getattr(config, name)
        if value is not None and not least <= value < below:
            rule = f"must be at least {least}"
            if below < math.inf:
                rule += f" and below {below}"
            elif isinstance(value, float):
                rule += " and finite"
            flag = f"--{name.replace('_', '-')} {value}"
            yield UserError(flag, rule, "leave it out for the default")


def divisors(number: int, most: int) -> str:
    """The divisors of `number` up to `most`, to offer as a remedy."""
    return ", ".join(str(d) for d in range(1, min(number, most) + 1) if number % d == 0)


def run_tool(main: Callable[[], int | None]) -> None:
    """Runs a tool's `main` and exits: 0 or its result, 2 after a `UserError`, 130 after Ctrl-C, 141
    where nobody reads the output any more."""
    try:
        sys.exit(main() or 0)
    except UserError as error:
        faults = error.faults if isinstance(error, UserErrors) else [error]
        for fault in faults:
            print(f"error: {fault}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:  # the reader of our output, such as head, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
