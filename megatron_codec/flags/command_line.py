"""Reads a command line flag by flag before tyro does, so that all its faults are told at once."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError
from megatron_codec.flags.megatron import megatron_flag
from megatron_codec.flags.megatron_flag import MegatronFlag

FLAG = r"--[a-z][a-z0-9-]*"  # as it stands in a message


@dataclasses.dataclass
class Scan:
    """A command line, sorted.

    Attributes:
        good: arguments that tyro can read.
        faults: what is wrong with the others.
        touched: real flags that the others are, or may have been meant to be.
        given: real flags, right or wrong, in their order.
        unchanged: Megatron's flags that ask for what happens anyway.
    """

    good: list[str] = dataclasses.field(default_factory=list)
    faults: list[UserError] = dataclasses.field(default_factory=list)
    touched: set[str] = dataclasses.field(default_factory=set)
    given: list[str] = dataclasses.field(default_factory=list)
    unchanged: list[str] = dataclasses.field(default_factory=list)


def known_flags() -> dict[str, object]:
    """Every flag of a run with its type; `--no-flag` beside each that is a boolean."""
    groups = typing.get_type_hints(PretrainConfig).values()
    return {flag: kind for group in groups for flag, kind in flags_of(group).items()}


def flags_of(group: type) -> dict[str, object]:
    """The flags of a dataclass with their types."""
    found: dict[str, object] = {}
    for name, kind in typing.get_type_hints(group).items():
        found[f"--{name.replace('_', '-')}"] = kind
        if kind is bool:
            found[f"--no-{name.replace('_', '-')}"] = kind
    return found


def scan(arguments: Sequence[str], flags: Mapping[str, object]) -> Scan:
    """Sorts `arguments` by the types of `flags`."""
    result = Scan()
    for given, values in _grouped(arguments):
        name = given.partition("=")[0]
        shown = " ".join([given, *values])
        taken = ([given.partition("=")[2]] if "=" in given else []) + values
        if name in ("--help", "-h"):
            result.good.append(given)
            continue
        spelt = name.replace("_", "-")
        if spelt in flags:
            result.given.append(spelt)
            rule, remedy = _fault_of(flags[spelt], taken)
            if rule:
                result.faults.append(UserError(shown, rule, remedy))
                result.touched.add(_positive(spelt))
            else:
                result.good += [spelt, *taken]
        elif entry := megatron_flag(spelt):
            _sort_megatron(name, entry, taken, result)
        else:
            near = difflib.get_close_matches(spelt, flags, 3, 0.75)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see --help for all flags"
            result.faults.append(UserError(shown, "is no flag", remedy))
            result.touched |= {_positive(flag) for flag in near}
    return result


def _sort_megatron(name: str, entry: MegatronFlag, taken: list[str], result: Scan) -> None:
    """Sorts a flag of Megatron-LM that is none here, with what stands behind it."""
    own, surplus = entry.cut(taken)
    shown = " ".join([name, *own])
    if entry.changes_nothing(own):
        result.unchanged.append(shown)
    elif entry.same and entry.takes == "one" and not own:
        result.faults.append(UserError(shown, "takes exactly one value", "give one, or leave the flag out"))
    else:
        rule, remedy = f"is not supported: {entry.reason}", entry.remedy
        if entry.same and entry.takes == "one":
            rule = f"is not supported, only {' or '.join(entry.same)}: {entry.reason}"
        result.faults.append(UserError(shown, rule, remedy))
        result.touched |= set(re.findall(FLAG, remedy))
    if surplus:
        takes = "no value" if entry.takes == "none" else "one value"
        result.faults.append(
            UserError(" ".join(surplus), f"follows {name}, which takes {takes}", "leave it out")
        )


def _positive(flag: str) -> str:
    return flag.replace("--no-", "--", 1)


def _grouped(arguments: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Each flag with what stands behind it; a negative number is a value."""
    flag: str | None = None
    values: list[str] = []
    for argument in arguments:
        if re.match(r"--?[A-Za-z]", argument) and not re.fullmatch(r"-(inf|nan)", argument):
            if flag is not None:
                yield flag, values
            flag, values = argument, []
        elif flag is None:
            yield argument, []
        else:
            values.append(argument)
    if flag is not None:
        yield flag, values


def _fault_of(kind: object, values: list[str]) -> tuple[str, str]:
    """Rule and remedy where `values` are none of this type, else two empty strings."""
    if kind is bool:
        return (
            ("takes no value", "leave the value out; --no- before the name switches off")
            if values
            else ("", "")
        )
    if typing.get_origin(kind) is tuple:
        if not values:
            return "needs at least one value", "give one, or leave the flag out"
        inner = typing.get_args(kind)
        if inner[-1] is not Ellipsis and len(values) != len(inner):
            return f"takes exactly {len(inner)} values", "give them, or leave the flag out"
        told = (_fault_of(inner[0], [value]) for value in values)
        return next((fault for fault in told if fault[0]), ("", ""))
    options = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
    tuples = [option for option in options if typing.get_origin(option) is tuple]
    if tuples and values != ["None"]:
        return _fault_of(tuples[0], values)
    if len(values) != 1:
        return "takes exactly one value", "give one, or leave the flag out for the default"
    rules = []
    for option in options:
        choices = typing.get_args(option) if typing.get_origin(option) is typing.Literal else ()
        if option is str or values[0] in choices or (option is type(None) and values[0] == "None"):
            return "", ""
        if choices:
            near = difflib.get_close_matches(values[0], choices, 1)
            rules.append((f"must be one of {', '.join(choices)}", f"did you mean {near[0]}?" if near else ""))
        elif option in (int, float):
            try:
                int(values[0]) if option is int else float(values[0])
                return "", ""
            except ValueError:
                rules.append(
                    (f"must be {'a whole number' if option is int else 'a number'}", "give a number")
                )
    return rules[0] if rules else ("", "")  # any other type is for tyro to read
