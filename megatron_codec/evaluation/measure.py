"""Numbers of one picture set, and their mean and deviation over seeds."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_codec.evaluation.distances import compare
from megatron_codec.evaluation.features import Extractor, features_of
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.sets import PictureSet, Sets

DISTANCES = ("frechet", "kernel", "precision", "recall")
STREAM_NUMBERS = ("share_valid", "share_decodes", "bytes", "bytes_of_real")


def measure(
    made: PictureSet, originals: Originals, extractor: Extractor, neighbours: int, sets: Sets
) -> dict[str, float]:
    """Distances of a set from the originals, and what its streams say. Features and numbers are kept."""

    def features(name: str, key: str, pixels: Callable[[], np.ndarray]) -> np.ndarray:
        def take() -> np.ndarray:
            # A second bar below that of the sets, for terminals only.
            with tqdm(desc="features", total=len(originals), leave=False, disable=None) as bar:
                return features_of(pixels(), extractor, bar.update)

        return sets.array(f"features-{name}", {"pictures": key, "extractor": extractor.identity}, take)

    def distances() -> dict[str, float]:
        real = features("original", originals.hash, lambda: originals.pictures)
        size = originals.codec.image_size
        return asdict(compare(real, features("set", made.key, lambda: made.pixels(size)), neighbours))

    identity = {"set": made.key, "extractor": extractor.identity, "neighbours": neighbours}
    return sets.json("distances", identity, distances) | stream_numbers(made, originals)


def stream_numbers(made: PictureSet, originals: Originals) -> dict[str, float]:
    """Of a set that a codec wrote: shares that are valid and that decode, mean bytes of a stream, and these
    over the mean of the originals' streams. Empty for pictures without streams."""
    numbers = made.numbers
    if not numbers or "bytes" not in numbers[0]:
        return {}
    size = float(np.mean([each["bytes"] for each in numbers]))
    return {
        "share_valid": float(np.mean([each["valid"] for each in numbers])),
        "share_decodes": float(np.mean([each["decodes"] for each in numbers])),
        "bytes": size,
        "bytes_of_real": size / float(np.mean([len(stream) for stream in originals.streams])),
    }


def over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each number its mean, its deviation (with n - 1; None of a single seed) and the values."""
    summary = {}
    for name in values[0]:
        column = [each[name] for each in values]
        deviation = float(np.std(column, ddof=1)) if len(column) > 1 else None
        summary[name] = {"mean": float(np.mean(column)), "deviation": deviation, "values": column}
    return summary
