"""Any picture made canonical: upright, 8-bit RGB, square, without metadata.

The codecs see only such pictures. Metadata has to go because Pillow copies what it finds in `Image.info`
into the files that it writes, so two pictures of equal pixels would get different streams.
"""

from typing import Literal, get_args

import numpy as np
from PIL import Image

from megatron_codec.errors import UserError

Geometry = Literal["crop", "pad"]

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


def canonical(media: Image.Image | np.ndarray, size: int, geometry: Geometry = "crop") -> Image.Image:
    """The picture as `size` x `size` RGB with an empty `info`.

    Args:
        media: a Pillow image of any mode, or a uint8 array [height, width] or [height, width, 3].
        size: side of the result in pixels.
        geometry: `crop` cuts the largest centred square and resizes it (bicubic); `pad` shrinks what is
            larger than `size`, enlarges nothing, and centres the picture on black.

    Raises UserError for an array of another shape or type, an empty picture, floating-point pixels or an
    unknown geometry; what Pillow raises for a file that is broken.
    """
    image = to_rgb(media if isinstance(media, Image.Image) else from_array(media))
    if min(image.size) == 0:
        raise UserError(f"picture of {image.width}x{image.height} pixels", "must not be empty")
    if geometry not in get_args(Geometry):
        raise UserError(f"geometry '{geometry}'", f"must be one of {', '.join(get_args(Geometry))}")
    if image.size == (size, size):
        fitted = image.copy() if image.info else image
    else:
        fitted = _crop(image, size) if geometry == "crop" else _pad(image, size)
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


def _crop(image: Image.Image, size: int) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def _pad(image: Image.Image, size: int) -> Image.Image:
    scale = min(1.0, size / max(image.size))
    width, height = (max(1, round(length * scale)) for length in image.size)
    if scale < 1:
        image = image.resize((width, height), Image.Resampling.BICUBIC)
    padded = Image.new("RGB", (size, size))
    padded.paste(image, ((size - width) // 2, (size - height) // 2))
    return padded
