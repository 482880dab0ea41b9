"""Distances by class, and whether what sets two models apart has to do with how rare a class is (figure 4 of
the paper: what JPEG-LM gains over the VQ transformer against how often a class occurs)."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_codec.errors import UserError, raise_all
from megatron_codec.evaluation.distances import frechet, kernel
from megatron_codec.evaluation.features import Extractor
from megatron_codec.evaluation.measure import real_features, set_features
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.sets import Made, Sets

FOLDERS = "folders"
_LEAST = 2  # pictures of a class: one has no covariance
_DISTANCES = {"frechet": frechet, "kernel": kernel}


@dataclass(frozen=True)
class Classes:
    """What --classes and --class-counts say.

    Attributes:
        source: the flag's value, for messages.
        of_name: the class of each picture's name; None where it is the name of its folder.
        counts: how often each class occurs in what was trained on; may be empty.
    """

    source: str
    of_name: Mapping[str, str] | None
    counts: Mapping[str, int]

    @classmethod
    def read(cls, classes: str | None, counts: Path | None) -> "Classes | None":
        """What the flags say; None where they are not given.

        Raises:
            UserError: a file cannot be read or is not of its form.
        """
        if classes is None:
            if counts:
                raise UserError(f"--class-counts {counts}", "needs --classes", "say which class is whose")
            return None
        of_name = (
            None if classes == FOLDERS else _read(f"--classes {classes}", Path(classes), "name", "class")
        )
        numbers: dict[str, int] = {}
        if counts:
            flag = f"--class-counts {counts}"
            for name, text in _read(flag, counts, "class", "count").items():
                if not text.isdecimal() or int(text) == 0:
                    raise UserError(
                        f"{flag}: count '{text}' of class '{name}'", "must be a whole number above 0"
                    )
                numbers[name] = int(text)
        return cls(classes, of_name, numbers)

    def members(self, names: Sequence[str]) -> dict[str, np.ndarray]:
        """The numbers of the pictures of each class, classes in order of their names.

        Raises:
            UserError: a picture has no class, a class has no count, or a class has too few pictures.
        """
        told = {*self.counts, *(self.of_name or {}).values()}
        found: dict[str, list[int]] = {name: [] for name in told}
        unknown = []
        for number, name in enumerate(names):
            kind = PurePosixPath(name).parent.name if self.of_name is None else self.of_name.get(name, "")
            if kind:
                found.setdefault(kind, []).append(number)
            else:
                unknown.append(name)
        flag, faults = f"--classes {self.source}", []
        if unknown:
            rule = f"has no class for {len(unknown)} of {len(names)} pictures, first '{unknown[0]}'"
            remedy = "name each picture as given here"
            if self.of_name is None:
                remedy = "put each class into a folder of its own below --data, or give a CSV file name,class"
            faults.append(UserError(flag, rule, remedy))
        for kind, numbers in sorted(found.items()):
            if len(numbers) < _LEAST:
                rule = f"has {len(numbers)} of the {len(names)} pictures and must have at least {_LEAST}"
                remedy = "give more --num-samples, or leave the class out of --classes and --class-counts"
                faults.append(UserError(f"class '{kind}'", rule, remedy))
            if self.counts and kind not in self.counts:
                faults.append(UserError(f"class '{kind}'", "has no count", "add it to --class-counts"))
        raise_all(faults)
        return {kind: np.array(numbers) for kind, numbers in sorted(found.items())}

    def rank_problem(self, names: Sequence[str], dimensions: int) -> str | None:
        """What is wrong with Frechet distances of so few pictures of a class, or None."""
        kind, numbers = min(self.members(names).items(), key=lambda item: len(item[1]))
        if len(numbers) > dimensions:
            return None
        return (
            f"class '{kind}' has {len(numbers)} pictures, not more than the {dimensions} features: Frechet "
            f"distances by class have a bias that depends on how many there are of a class and on how much "
            f"the pictures of a row differ, so a gain may be that bias; read the kernel distance, which has "
            f"none"
        )


def compare_classes(
    classes: Classes,
    made: Made,
    originals: Originals,
    extractor: Extractor,
    sets: Sets,
    progress: Callable[[int], object] = lambda count: None,
) -> dict[str, Any]:
    """Frechet and kernel distances by class, of each row of the tables, and what sets every two apart.

    Args:
        made: the sets of the rows.

    Returns:
        `pictures` and `counts` of each class; `distances`, a dictionary for each row and distance with
        `distance` ("frechet" or "kernel"), `completer`, `ratio` and `of_class` (means over seeds);
        `comparisons` of each distance, with the first row of its ratio as `completer` and each other one as
        `other`: `gain` (the other's distance less the first's) of each class and, with counts, `pearson` of
        the gain with the logarithm of the count and `spearman`, both (coefficient, p-value), or None where
        they are not defined.
    """
    members = classes.members(originals.names)
    real = real_features(originals, extractor, sets).astype(np.float64)
    distances = []
    for (name, ratio), of_seeds in made.items():
        tables = [set_features(one, originals, extractor, sets).astype(np.float64) for one in of_seeds]
        for distance, compute in _DISTANCES.items():
            of_class = {
                kind: float(np.mean([compute(real[numbers], table[numbers]) for table in tables]))
                for kind, numbers in members.items()
            }
            row = {"distance": distance, "completer": name, "ratio": ratio, "of_class": of_class}
            distances.append(row)
        progress(1)
    comparisons = []
    for distance in _DISTANCES:
        for ratio in dict.fromkeys(row["ratio"] for row in distances):
            first, *others = [
                row for row in distances if row["ratio"] == ratio and row["distance"] == distance
            ]
            for other in others:
                gain = {kind: other["of_class"][kind] - first["of_class"][kind] for kind in members}
                comparison = {"distance": distance, "ratio": ratio, "completer": first["completer"]}
                comparison |= {"other": other["completer"], "gain": gain}
                comparisons.append(comparison | _correlations(gain, classes.counts))
    return {
        "pictures": {kind: len(numbers) for kind, numbers in members.items()},
        "counts": dict(classes.counts),
        "distances": distances,
        "comparisons": comparisons,
    }


def _correlations(gain: Mapping[str, float], counts: Mapping[str, int]) -> dict[str, Any]:
    if not counts:
        return {}
    from scipy import stats

    values = np.array(list(gain.values()))
    logs = np.log10([counts[kind] for kind in gain])
    if len(gain) < 3 or np.ptp(values) == 0 or np.ptp(logs) == 0:
        return {"pearson": None, "spearman": None}
    correlations = {}
    for name, correlate in (("pearson", stats.pearsonr), ("spearman", stats.spearmanr)):
        coefficient, p_value = tuple(correlate(logs, values))
        correlations[name] = [float(coefficient), float(p_value)]
    return correlations


def _read(flag: str, path: Path, key: str, value: str) -> dict[str, str]:
    """Two columns of a CSV file with a header."""
    try:
        with open(path, newline="", encoding="utf-8") as stream:
            table = csv.DictReader(stream)
            columns = table.fieldnames or []
            if key not in columns or value not in columns:
                rule = f"has the columns {', '.join(columns) or 'none'} and must have {key} and {value}"
                raise UserError(flag, rule, f"write the header {key},{value}")
            found: dict[str, str] = {}
            for row in table:
                if row[key] in found:
                    raise UserError(flag, f"line {table.line_num}: '{row[key]}' stands there twice")
                if not row[key] or not row[value]:
                    raise UserError(flag, f"line {table.line_num}: lacks {key} or {value}")
                found[row[key]] = row[value]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(flag, f"cannot be read: {error}", f"give a CSV file {key},{value}") from error
    if not found:
        raise UserError(flag, "has no rows", f"give a CSV file {key},{value}")
    return found
