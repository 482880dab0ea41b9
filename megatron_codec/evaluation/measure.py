"""Numbers of one picture set, and their mean and deviation over seeds."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_codec.evaluation.distances import compare
from megatron_codec.evaluation.features import Extractor, features_of
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.sets import PictureSet, Sets

DISTANCES = ("frechet", "kernel", "precision", "recall")


def measure(
    made: PictureSet, originals: Originals, extractor: Extractor, neighbours: int, sets: Sets
) -> dict[str, float]:
    """Distances of a set from the originals, and what its streams say. Features and numbers are kept."""

    def distances() -> dict[str, float]:
        real = real_features(originals, extractor, sets)
        return asdict(compare(real, set_features(made, originals, extractor, sets), neighbours))

    identity = _identity(made.key, originals, extractor) | {"neighbours": neighbours}
    return sets.json("distances", identity, distances) | stream_numbers(made)


def real_features(originals: Originals, extractor: Extractor, sets: Sets) -> np.ndarray:
    """Features [n, d] of the originals, from the cache or computed."""

    def take() -> np.ndarray:
        return _features_of(originals.active(originals.pictures), extractor)

    return sets.array("features-original", _identity(originals.hash, originals, extractor), take)


def set_features(made: PictureSet, originals: Originals, extractor: Extractor, sets: Sets) -> np.ndarray:
    """Features [n, d] of a set of completed pictures, from the cache or computed."""

    def take() -> np.ndarray:
        return _features_of(originals.active(made.pixels(originals.image_size)), extractor)

    return sets.array("features-set", _identity(made.key, originals, extractor), take)


def _identity(key: str, originals: Originals, extractor: Extractor) -> dict[str, Any]:
    return {"pictures": key, "extractor": extractor.identity, "half_size": originals.half_size}


def _features_of(pixels: np.ndarray, extractor: Extractor) -> np.ndarray:
    # A second bar below that of the sets, for terminals only.
    with tqdm(desc="features", total=len(pixels), leave=False, disable=None) as bar:
        return features_of(pixels, extractor, bar.update)


def stream_numbers(made: PictureSet) -> dict[str, float]:
    """Of a set that a codec wrote: shares that are valid and that decode, mean bytes of a stream, and these
    over the mean of the originals' streams; the same of files, where the codec writes such and all decode; of
    originals through a codec also `psnr`, in dB, of the mean squared error of all, where it is not 0. Empty
    for pictures without streams."""
    numbers = made.numbers
    if not numbers or "bytes" not in numbers[0]:
        return {}

    def mean(name: str) -> float:
        return float(np.mean([each[name] for each in numbers]))

    known = {
        "share_valid": mean("valid"),
        "share_decodes": mean("decodes"),
        "bytes": mean("bytes"),
        "bytes_of_real": mean("bytes") / mean("real_bytes"),
    }
    if all("file_bytes" in each for each in numbers):
        known["file_bytes"] = mean("file_bytes")
        known["file_bytes_of_real"] = mean("file_bytes") / mean("real_file_bytes")
    if "squared_error" in numbers[0] and mean("squared_error") > 0:
        known["psnr"] = 10 * math.log10(255**2 / mean("squared_error"))
    return known


def over_seeds(values: Sequence[Mapping[str, float]]) -> dict[str, dict[str, Any]]:
    """Of each number its mean, its deviation (with n - 1; None of a single seed) and the values."""
    summary = {}
    for name in values[0]:
        column = [each[name] for each in values]
        deviation = float(np.std(column, ddof=1)) if len(column) > 1 else None
        summary[name] = {"mean": float(np.mean(column)), "deviation": deviation, "values": column}
    return summary
