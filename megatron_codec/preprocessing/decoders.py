"""Files to pixels, with Pillow; `dali.py` does the same with NVIDIA DALI."""

import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any, Protocol

import numpy as np
import PIL
import PIL.features
from PIL import Image

from megatron_codec.preprocessing.sources import Item, UnusableError

Picture = Image.Image | np.ndarray

# Pillow warns of more. 256 MiB in RGB.
MAX_PIXELS = 89_478_485

# Pillow would run Ghostscript for the first; the others it identifies but cannot decode.
_EXCLUDED_FORMATS = {"EPS", "BUFR", "GRIB", "HDF5", "MPEG", "WMF"}


class Decoder(Protocol):
    """Decodes pictures. Is sent to worker processes."""

    def decode(
        self, items: Iterable[Item], pixels_needed: Callable[[int, int], tuple[int, int]]
    ) -> Iterator[tuple[Item, Picture | Exception]]:
        """Each item, in order, with its picture or what was raised about it.

        Args:
            pixels_needed: the least width and height that are of use of a picture of this width and height;
                a decoder may give a reduced picture that is at least as large.
        """
        ...

    def settings(self) -> dict[str, Any]:
        """JSON values, for the manifest."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that have a part in the pixels."""
        ...


@dataclass(frozen=True)
class PillowDecoder:
    """Whatever Pillow opens; the first frame of an animation.

    Args:
        max_pixels: pictures with more are refused.
        scaled_decode: let libjpeg decode JPEG files at 1/2, 1/4 or 1/8 of their size where that leaves
            enough pixels. Several times as fast; the pixels differ a little.
    """

    max_pixels: int = MAX_PIXELS
    scaled_decode: bool = True

    def decode(
        self, items: Iterable[Item], pixels_needed: Callable[[int, int], tuple[int, int]]
    ) -> Iterator[tuple[Item, Picture | Exception]]:
        """See `Decoder`."""
        for item in items:
            try:
                content = item.read()
                picture = (
                    content if isinstance(content, np.ndarray) else self._picture(content, pixels_needed)
                )
            except MemoryError:  # no fault of the picture
                raise
            # Pillow's decoders answer broken files with nearly every kind of exception there is.
            except Exception as error:
                picture = error
            yield item, picture

    def _picture(self, content: bytes, pixels_needed: Callable[[int, int], tuple[int, int]]) -> Image.Image:
        image = open_picture(content, self.max_pixels)
        if self.scaled_decode and image.format == "JPEG":
            image.draft(None, pixels_needed(*image.size))  # type: ignore[arg-type]  # None keeps the mode
        image.load()
        return image

    def settings(self) -> dict[str, Any]:
        """See `Decoder`."""
        return {"name": "pillow"} | asdict(self)

    def versions(self) -> dict[str, str]:
        """See `Decoder`."""
        return pillow_versions()


def open_picture(content: bytes, max_pixels: int) -> Image.Image:
    """The picture in a file, its header read and its pixels not. Raises `UnusableError`."""
    if not content:
        raise UnusableError("empty file", "the file has no bytes")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit is ours
        try:
            image = Image.open(io.BytesIO(content), formats=formats())
        except Image.UnidentifiedImageError:
            raise UnusableError("not a picture", "Pillow cannot identify it as a picture") from None
        except Image.DecompressionBombError as error:
            raise UnusableError("too many pixels", str(error)) from None
    if image.width * image.height > max_pixels:
        reason = f"{image.width} x {image.height} pixels are above --max-pixels {max_pixels}"
        raise UnusableError("too many pixels", reason)
    return image


@cache
def formats() -> tuple[str, ...]:
    """Pillow's names of the formats that are opened."""
    Image.init()
    return tuple(form for form in Image.ID if form not in _EXCLUDED_FORMATS)


@cache
def picture_suffixes() -> frozenset[str]:
    """Endings of the files that are opened."""
    known = Image.registered_extensions().items()
    return frozenset(suffix for suffix, form in known if form in formats())


def pillow_versions() -> dict[str, str]:
    """Versions of Pillow and of libjpeg-turbo within it."""
    libjpeg = PIL.features.version_feature("libjpeg_turbo") or "not used"
    return {"pillow": PIL.__version__, "libjpeg_turbo": libjpeg}
