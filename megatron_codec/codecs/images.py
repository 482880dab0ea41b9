"""Any picture made canonical: upright, 8-bit RGB, square, without metadata.

The codecs see only such pictures. Metadata has to go because Pillow copies what it finds in `Image.info`
into the files that it writes, so two pictures of equal pixels would get different streams.
"""

import hashlib
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from PIL import Image

from megatron_codec.errors import UserError, raise_all

Method = Literal["crop", "random-crop", "pad"]
Resample = Literal["bicubic", "lanczos", "box"]

_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


@dataclass(frozen=True)
class Geometry:
    """How a picture becomes square.

    Args:
        method: `crop` cuts the largest centred square and resizes it; `random-crop` cuts a square at a random
            place, whose side is a random share, at least `min_crop`, of the shorter side; `pad` shrinks
            what is too large, enlarges nothing, and centres the picture on black.
        resample: Pillow's filter.
        seed: with the picture's name, decides the random crop: the same picture gets the same crop
            wherever and whenever it is read.
        min_crop: above 0 and at most 1.

    Raises UserError for an unknown method or filter and for a share out of range.
    """

    method: Method = "crop"
    resample: Resample = "bicubic"
    seed: int = 0
    min_crop: float = 1.0

    def __post_init__(self) -> None:
        faults = []
        for name, value, choices in (
            ("geometry", self.method, get_args(Method)),
            ("resample", self.resample, get_args(Resample)),
        ):
            if value not in choices:
                faults.append(UserError(f"{name} '{value}'", f"must be one of {', '.join(choices)}"))
        if not 0 < self.min_crop <= 1:
            faults.append(UserError(f"min crop {self.min_crop}", "must be above 0 and at most 1"))
        elif self.min_crop < 1 and self.method != "random-crop":
            rule = f"has no meaning for the geometry '{self.method}'"
            faults.append(UserError(f"min crop {self.min_crop}", rule, "use the geometry 'random-crop'"))
        raise_all(faults)

    def pixels_needed(self, width: int, height: int, size: int) -> tuple[int, int]:
        """The smallest width and height of a reduced picture from which nothing has to be enlarged."""
        if self.method == "pad":
            longer = max(width, height)
            return -(-width * size // longer), -(-height * size // longer)
        side = -(-size // self.min_crop) if self.method == "random-crop" else size
        return int(side), int(side)

    def _square(self, width: int, height: int, name: str) -> tuple[float, float, float]:
        """Left, top and side of the square that is cut."""
        side = min(width, height)
        if self.method == "crop":
            return (width - side) / 2, (height - side) / 2, side
        draws = hashlib.sha256(f"{self.seed}/{name}".encode("utf-8", "surrogateescape")).digest()
        scale, x, y = (int.from_bytes(draws[i : i + 8], "big") / 2**64 for i in (0, 8, 16))
        side *= self.min_crop + (1 - self.min_crop) * scale
        return (width - side) * x, (height - side) * y, side


def canonical(
    media: Image.Image | np.ndarray, size: int, geometry: Geometry | None = None, name: str = ""
) -> Image.Image:
    """The picture as `size` x `size` RGB with an empty `info`.

    Args:
        media: a Pillow image of any mode, or a uint8 array [height, width] or [height, width, 3].
        size: side of the result in pixels.
        geometry: how it becomes square; by default the largest centred square, bicubic.
        name: of the picture, for a random crop.

    Raises UserError for an array of another shape or type, an empty picture and floating-point pixels; what
    Pillow raises for a file that is broken.
    """
    geometry = geometry or Geometry()
    image = to_rgb(media if isinstance(media, Image.Image) else from_array(media))
    if min(image.size) == 0:
        raise UserError(f"picture of {image.width}x{image.height} pixels", "must not be empty")
    if image.size == (size, size) and geometry.min_crop == 1:
        fitted = image.copy() if image.info else image
    else:
        resample = Image.Resampling[geometry.resample.upper()]
        if geometry.method == "pad":
            fitted = _pad(image, size, resample)
        else:
            left, top, side = geometry._square(image.width, image.height, name)
            fitted = image.resize((size, size), resample, box=(left, top, left + side, top + side))
    if fitted is not image:
        fitted.info = {}
    return fitted


def from_array(array: np.ndarray) -> Image.Image:
    """A grey or RGB image of a uint8 array [height, width] or [height, width, 3]."""
    array = np.asarray(array)
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):
        raise UserError(
            f"array of {array.dtype} {list(array.shape)}",
            "a picture is uint8 [height, width] or [height, width, 3]",
        )
    return Image.fromarray(np.ascontiguousarray(array))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image upright and in RGB, alpha over white, ICC profile ignored; itself if it is so already."""
    transposition = _UPRIGHT.get(_orientation(image))
    if transposition is not None:
        image = image.transpose(transposition)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        # Pillow would clip at 255 instead of scaling. Its 32-bit grey is a 16-bit file in wider words.
        return from_array((np.asarray(image).clip(0, 65535) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError("floating-point picture", "pixels need a known range", "convert it to 8 or 16 bit")
    if image.has_transparency_data:
        rgba = image.convert("LA" if image.mode == "La" else image.mode).convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 to 8. Damaged EXIF is common and no reason to lose a good picture."""
    if not image.info and image.format is None:
        return 1
    try:
        return image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        return 1


def _pad(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    scale = min(1.0, size / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    if scale < 1:
        image = image.resize((width, height), resample)
    padded = Image.new("RGB", (size, size))
    padded.paste(image, ((size - width) // 2, (size - height) // 2))
    return padded
