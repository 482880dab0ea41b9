"""Cuts squares of 64x64 from real colour photos that come in packages: train.npy and test.npy.

    python examples/photo_crops.py --opencv /usr/share/doc/opencv-doc --output data/photos-64

Every fifth photo is held out whole, so that no square of test.npy shows what one of train.npy does.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from megatron_codec.errors import UserError, run_tool
from megatron_codec.files import whole_file

SIZE = 64
# These packages have more pictures: drawings, diagrams, grey ones, and many of one scene.
PHOTOS = {
    "opencv": """
        alphamat/input_images/plant.jpg data/aero1.jpg data/aloeL.jpg data/apple.jpg data/baboon.jpg
        data/board.jpg data/building.jpg data/butterfly.jpg data/chicky_512.png data/ela_original.jpg
        data/fruits.jpg data/graf1.png data/home.jpg data/left.jpg data/leuvenA.jpg data/messi5.jpg
        data/orange.jpg data/rubberwhale1.png data/squirrel_cls.jpg data/stuff.jpg dnn_superres/butterfly.png
        reg/home.png text/scenetext01.jpg text/scenetext02.jpg text/scenetext03.jpg text/scenetext04.jpg
        text/scenetext05.jpg text/scenetext06.jpg text/scenetext_segmented_word01.jpg
        text/scenetext_segmented_word02.jpg text/scenetext_segmented_word04.jpg""",
    "skimage": "astronaut.png chelsea.png coffee.png motorcycle_left.png rocket.jpg",
    "sklearn": "china.jpg flower.jpg",
    "matplotlib": "grace_hopper.jpg",
}
FOLDERS = {
    "skimage": "data",
    "sklearn": "datasets/images",
    "matplotlib": "mpl-data/sample_data",
}
SHARES = (1.0, 0.7, 0.5, 0.35, 0.25)  # sides of squares, of the shorter side of their photo


@dataclass(frozen=True)
class Arguments:
    """Cuts squares from photos and writes them as uint8 [n, 64, 64, 3]."""

    opencv: Path
    """Folder of Debian's opencv-doc, usr/share/doc/opencv-doc in it."""
    output: Path
    """Folder for train.npy and test.npy."""


def photos(opencv: Path) -> list[Path]:
    """The photos, in the order of `PHOTOS`.

    Raises:
        UserError: a package is missing, or has no such photo.
    """
    found = []
    for package, names in PHOTOS.items():
        if package == "opencv":
            folder = opencv / "examples"
        else:
            spec = find_spec(package)
            if spec is None or spec.origin is None:
                raise UserError(package, "is not installed", "pip install -r requirements/dev.txt")
            folder = Path(spec.origin).parent / FOLDERS[package]
        found += [folder / name for name in names.split()]
    missing = [str(path) for path in found if not path.is_file()]
    if missing:
        raise UserError(", ".join(missing), "are missing", "look where --opencv points to")
    return found


def squares(photo: Image.Image) -> Iterator[np.ndarray]:
    """Overlapping squares of several sides, uint8 [64, 64, 3] each; nothing is enlarged."""
    for share in SHARES:
        side = round(min(photo.size) * share)
        if side < SIZE:
            break
        for top in range(0, photo.height - side + 1, side // 3):
            for left in range(0, photo.width - side + 1, side // 3):
                box = (left, top, left + side, top + side)
                yield np.asarray(photo.resize((SIZE, SIZE), Image.Resampling.BICUBIC, box=box))


def main() -> None:
    arguments = tyro.cli(Arguments, description=Arguments.__doc__)
    train, test = [], []
    for number, path in enumerate(tqdm(photos(arguments.opencv), unit="photo")):
        found = list(squares(Image.open(path).convert("RGB")))
        if number % 5 == 2:
            test += found
        else:
            train += [turned for square in found for turned in (square, square[:, ::-1])]
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, pictures in (("train", train), ("test", test)):
        with whole_file(arguments.output / f"{name}.npy") as stream:
            np.save(stream, np.stack(pictures))
        print(f"{arguments.output / name}.npy: {len(pictures):,} pictures")


if __name__ == "__main__":
    run_tool(main)
