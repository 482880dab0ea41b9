"""Opens the datasets of a run together, so that what is wrong with any of them is told at once."""

from collections.abc import Mapping, Sequence
from fractions import Fraction

from megatron_codec.data.blend import parse_blend
from megatron_codec.data.dataset import CodecDataset
from megatron_codec.errors import UserError, collecting, raise_all

Parts = list[tuple[Fraction | None, CodecDataset]]  # with their weights, where they were given


def open_alike(paths: Mapping[str, Sequence[str]]) -> dict[str, Parts]:
    """The datasets of each flag, in the order given.

    Args:
        paths: of a flag, prefixes, or a weight before each (`parse_blend`).

    Raises:
        UserError: all datasets that are missing or damaged, weights that are none, and datasets that were
            made with another tokenizer or codec than the first.
    """
    faults: list[UserError] = []
    opened: dict[str, Parts] = {}
    for flag, values in paths.items():
        opened[flag] = []
        with collecting(faults):
            for weight, prefix in parse_blend(flag, values):
                with collecting(faults):
                    opened[flag].append((weight, CodecDataset.open(prefix)))
    faults += _unlike(opened)
    raise_all(faults)
    return opened


def _unlike(opened: Mapping[str, Parts]) -> list[UserError]:
    flagged = [(flag, dataset) for flag, parts in opened.items() for _, dataset in parts]
    if not flagged:
        return []
    first = flagged[0][1]
    return [
        UserError(
            f"{flag} {dataset.prefix}",
            f"was made with another tokenizer or codec than {first.prefix}",
            "make both with the same --tokenizer and codec settings",
        )
        for flag, dataset in flagged
        if dataset.manifest.tokenizer != first.manifest.tokenizer
        or dataset.manifest.codec != first.manifest.codec
    ]
