"""What tests of evaluations share: photographs, features that take no time, a command line."""

from pathlib import Path

from megatron_codec.evaluation.evaluate_config import EvaluateConfig
from tests.data_sources import photo_crops


class Blocks:
    """Mean colours of blocks of 8 pixels: features that take no time."""

    def __init__(self, dimensions=48):
        self.name, self.dimensions, self.seen = "mean colours", dimensions, 0
        self.identity = {"name": self.name}

    def __call__(self, pictures):
        self.seen += len(pictures)
        n, side = pictures.shape[:2]
        return pictures.reshape(n, side // 8, 8, side // 8, 8, 3).mean(axis=(2, 4)).reshape(n, -1)


def write_photos(folder: Path, count: int = 60) -> Path:
    """Photographs of 40 pixels."""
    for number, crop in enumerate(photo_crops(count, 40)):
        crop.save(folder / f"{number:02d}.png")
    return folder


def config(photos: Path, output: Path, **changes) -> EvaluateConfig:
    """Of all the 60 at 32 pixels, at two ratios with two seeds, but for the changes."""
    given = {"image_size": 32, "ratios": (0.25, 0.5), "num_samples": 60, "seeds": 2} | changes
    return EvaluateConfig(data=(photos,), output=output, **given)


def means(results, name="frechet"):
    """{ratio: {completer: mean}}"""
    found = {}
    for row in results["rows"]:
        found.setdefault(row["ratio"], {})[row["completer"]] = row["numbers"][name]["mean"]
    return found
