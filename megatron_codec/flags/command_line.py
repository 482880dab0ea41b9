"""Reads a command line flag by flag before tyro does, so that all its faults are told at once."""

import dataclasses
import difflib
import re
import types
import typing
from collections.abc import Iterator, Sequence

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError
from megatron_codec.flags.megatron import MEGATRON_FLAGS


@dataclasses.dataclass
class Scan:
    """A command line, sorted.

    Attributes:
        good: arguments that tyro can read.
        faults: what is wrong with the others.
        touched: real flags that the others are, or may have been meant to be.
        unchanged: Megatron's flags that ask for what happens anyway.
    """

    good: list[str] = dataclasses.field(default_factory=list)
    faults: list[UserError] = dataclasses.field(default_factory=list)
    touched: set[str] = dataclasses.field(default_factory=set)
    unchanged: list[str] = dataclasses.field(default_factory=list)


def known_flags() -> dict[str, object]:
    """Every flag of the dataclasses with its type; `--no-flag` beside each that is a boolean."""
    found: dict[str, object] = {}
    for group in typing.get_type_hints(PretrainConfig).values():
        for name, kind in typing.get_type_hints(group).items():
            found[f"--{name.replace('_', '-')}"] = kind
            if kind is bool:
                found[f"--no-{name.replace('_', '-')}"] = kind
    return found


def scan(arguments: Sequence[str], extra: Sequence[str] = ()) -> Scan:
    """Sorts `arguments`; `extra` are flags read elsewhere that a misspelt one may have been meant to be."""
    flags, result = known_flags(), Scan()
    for given, values in _grouped(arguments):
        name = given.partition("=")[0]
        shown = " ".join([given, *values])
        taken = ([given.partition("=")[2]] if "=" in given else []) + values
        if name in ("--help", "-h"):
            result.good.append(given)
            continue
        spelt = name.replace("_", "-")
        if spelt in flags:
            rule, remedy = _fault_of(flags[spelt], taken)
            if rule:
                result.faults.append(UserError(shown, rule, remedy))
                result.touched.add(spelt.replace("--no-", "--", 1))
            else:
                result.good += [spelt, *taken]
        elif spelt in MEGATRON_FLAGS:
            entry = MEGATRON_FLAGS[spelt]
            if entry.same is not None and _equal(" ".join(taken), entry.same):
                result.unchanged.append(shown)
            else:
                result.faults.append(UserError(shown, f"is not supported: {entry.reason}", entry.remedy))
        else:
            near = difflib.get_close_matches(spelt, [*flags, *extra], 3, 0.75)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see --help for all flags"
            result.faults.append(UserError(shown, "is no flag", remedy))
            result.touched |= {flag.replace("--no-", "--", 1) for flag in near}
    return result


def true_faults(config: PretrainConfig, world_size: int, touched: set[str]) -> list[UserError]:
    """Faults of the values, without those that speak of a flag whose value could not be read."""
    layout = {"--tensor-model-parallel-size", "--pipeline-model-parallel-size"}
    if touched & layout:  # the batch is divided by what the layout leaves
        touched = touched | layout | {"--global-batch-size"}
    return [
        fault
        for fault in config.faults(world_size)
        if not touched & set(re.findall(r"--[a-z][a-z0-9-]*", str(fault)))
    ]


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


def _equal(given: str, same: str) -> bool:
    try:
        return float(given) == float(same)
    except ValueError:
        return given == same
