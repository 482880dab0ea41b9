"""What examples/reproduce_small.sh left in its folder.

RUN/evaluations/compare/  half-size/  sampling/  scale/  quality/     folders of tools/evaluate.py
RUN/settings                                                          the variables that the script was given
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_codec.errors import UserError

COMMAND = "bash examples/reproduce_small.sh"
# What the models of the stage `compare` are called, first the one that the others are compared with.
MODELS = {"jpeg": "JPEG-LM", "vq": "VQ transformer", "pixels": "pixel model"}


@dataclass(frozen=True)
class Pictures:
    """What a DATASET of the script is: in words, in short, and the side of a picture."""

    words: str
    short: str
    side: int


_DATASETS = {
    "fashion-mnist": Pictures(
        "Fashion-MNIST at 32x32 (60,000 pictures to train on; the colour pipeline is that of any picture)",
        "Fashion-MNIST at 32x32",
        32,
    ),
    "photos": Pictures(
        "overlapping squares of 64x64 from 31 real colour photos, and mirrored ones (13,018 to train on); "
        "those that are completed are from 8 other photos. The pixel model writes 32x32, enlarged by a "
        "bicubic filter",
        "photos at 64x64",
        64,
    ),
}


def variables(run: Path) -> str:
    """What the script was given, as one writes it before a command."""
    try:
        return (run / "settings").read_text(encoding="utf-8").strip()
    except FileNotFoundError:  # a run of before they were kept
        return ""


def dataset(run: Path) -> Pictures:
    """What the models of a run were trained on.

    Raises:
        UserError: the run is of a dataset that is not known.
    """
    given = dict(word.split("=", 1) for word in variables(run).split())
    name = given.get("DATASET", next(iter(_DATASETS)))
    if name not in _DATASETS:
        rule = f"must be one of {', '.join(_DATASETS)}"
        raise UserError(f"{run / 'settings'}: DATASET={name}", rule, "give the RUN of the script")
    return _DATASETS[name]


@dataclass(frozen=True)
class Stage:
    """What tools/evaluate.py found.

    Attributes:
        folder: of its report.
        results: its results.json.
    """

    folder: Path
    results: dict[str, Any]

    @classmethod
    def read(cls, run: Path, name: str) -> "Stage | None":
        """A stage that has ended, or None.

        Raises:
            UserError: its results are damaged.
        """
        folder = run / "evaluations" / name
        path = folder / "results.json"
        if not path.exists():
            return None
        try:
            return cls(folder, json.loads(path.read_text(encoding="utf-8")))
        except ValueError as error:
            raise UserError(f"{path}", f"cannot be read ({error})", f"run {COMMAND} again") from error

    @property
    def ratios(self) -> list[float]:
        """Prompt ratios."""
        return list(dict.fromkeys(row["ratio"] for row in self.results["rows"]))

    @property
    def checkpoints(self) -> dict[str, dict[str, Any]]:
        """What is known of each model, by its name."""
        return {checkpoint["name"]: checkpoint for checkpoint in self.results["checkpoints"]}

    def number(self, name: str, ratio: float, what: str = "frechet") -> dict[str, Any] | None:
        """Mean and deviation of a row; `name` is the row's, or that of a model."""
        for row in self.results["rows"]:
            # "model (jpeg), top-k 40, top-p 0.9", which may be called "jpeg" where there is one of it
            short = row["completer"].partition("model (")[2].partition(")")[0]
            if name in (short, row["completer"]) and row["ratio"] == ratio:
                return row["numbers"].get(what)
        return None

    @property
    def references(self) -> list[str]:
        """The rows that are no models."""
        names = [row["completer"] for row in self.results["rows"]]
        return list(dict.fromkeys(name for name in names if not name.startswith("model (")))


def answer(stage: Stage) -> list[str]:
    """How far JPEG-LM's distance is from that of each baseline, a sentence for each ratio."""
    sentences = []
    first, *others = MODELS
    for ratio in stage.ratios:
        ours, parts = stage.number(first, ratio), []
        for name in others:
            theirs = stage.number(name, ratio)
            if ours is None or theirs is None:
                continue
            if ours["deviation"] is None or theirs["deviation"] is None:
                parts.append(
                    f"{ours['mean']:.1f} and that of the {MODELS[name]} {theirs['mean']:.1f} (one seed, "
                    "which does not tell them apart)"
                )
                continue
            change = ours["mean"] / theirs["mean"] - 1
            # Three deviations of the difference: what sampling alone hardly does.
            noise = 3 * (ours["deviation"] ** 2 + theirs["deviation"] ** 2) ** 0.5
            apart = abs(ours["mean"] - theirs["mean"]) > noise
            where = f"{abs(change):.0%} {'below' if change < 0 else 'above'}" if apart else "not apart from"
            parts.append(f"{where} that of the {MODELS[name]}")
        if not parts:
            continue
        which = f"At prompt ratio {ratio:g}" if ratio else "From nothing"
        sentences.append(f"{which} the distance of {MODELS[first]} is {' and '.join(parts)}.")
    return sentences
