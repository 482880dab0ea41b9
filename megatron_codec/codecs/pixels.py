"""The pictures of a pixel model (ImageGPT: Chen et al., "Generative Pretraining from Pixels", 2020, section
3.2): every pixel is the nearest of a few hundred colours, and pictures are read row by row.

The colours are a setting, so that a dataset or checkpoint says by itself what it shows;
`tools/train_palette.py` finds them and writes the tokenizer in which each colour is one token.

    codec = PixelsCodec(image_size=32, palette=palette_text(colours))
    stream = codec.encode(Image.open("cat.png"))        # 2 bytes a pixel
"""

import base64
import binascii
import io
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from megatron_codec.codecs import codes
from megatron_codec.codecs.base import DecodeError, Report
from megatron_codec.codecs.images import canonical
from megatron_codec.errors import UserError, raise_all

_GREY = (128, 128, 128)  # of pixels that a stream lacks


@dataclass(frozen=True)
class PixelsCodec:
    """Pictures to colours of a palette and back.

    Args:
        image_size: side of the square picture in pixels.
        palette: the colours, as `palette_text` writes them.

    Raises UserError for a size below 1 and for a text that is no palette.
    """

    name: ClassVar[str] = "pixels"
    file_suffix: ClassVar[str] = ".png"

    image_size: int = 32
    palette: str = ""

    def __post_init__(self) -> None:
        faults = []
        if not 1 <= self.image_size <= 1024:
            faults.append(UserError(f"image size {self.image_size}", "must lie between 1 and 1024"))
        try:
            number = len(self.colours)
            if not 2 <= number <= codes.MAX_CODES:
                rule = f"must have 2 to {codes.MAX_CODES} colours"
                faults.append(UserError(f"palette of {number} colours", rule, "use tools/train_palette.py"))
        except (binascii.Error, ValueError, zlib.error):
            remedy = "take it from the tokenizer that tools/train_palette.py writes"
            faults.append(UserError(f"palette '{self.palette[:20]}'", "cannot be read", remedy))
        raise_all(faults)

    @cached_property
    def colours(self) -> np.ndarray:
        """RGB, uint8 [colours, 3]."""
        raw = zlib.decompress(base64.b85decode(self.palette))
        return np.frombuffer(raw, np.uint8).reshape(-1, 3)

    @property
    def merges(self) -> list[tuple[int, int]]:
        """Of the vocabulary in which each colour is one token."""
        return codes.merges(len(self.colours))

    @property
    def preamble(self) -> bytes:
        """Nothing."""
        return b""

    def encode(self, media: Image.Image | np.ndarray) -> bytes:
        """The nearest colour of every pixel, by squares of differences in RGB, the first among equals.

        Args:
            media: a Pillow image, or a uint8 array [height, width] or [height, width, 3]. One of another
                mode, orientation or size is made canonical first.
        """
        pixels = np.asarray(canonical(media, self.image_size)).reshape(-1, 3)
        different, places = np.unique(pixels, axis=0, return_inverse=True)
        return codes.to_stream(nearest(different, self.colours)[places.reshape(-1)])

    def decode(self, stream: bytes) -> Image.Image:
        """The RGB picture; pixels that a stream lacks are grey. Raises DecodeError for a stream of bytes that
        does not begin with a code."""
        found = codes.from_stream(stream, len(self.colours))[: self.image_size**2]
        if len(stream) and not len(found):
            raise DecodeError(f"stream of {len(stream)} bytes", "does not begin with a colour of the palette")
        pixels = np.full((self.image_size**2, 3), _GREY, np.uint8)
        pixels[: len(found)] = self.colours[found]
        return Image.fromarray(pixels.reshape(self.image_size, self.image_size, 3))

    def prompt(self, stream: bytes, ratio: float) -> bytes:
        """The first rows of pixels, the share `ratio` of them, rounded down."""
        if not 0 <= ratio <= 1:
            raise UserError(f"prompt ratio {ratio}", "must lie between 0 and 1")
        return stream[: 2 * self.image_size * int(self.image_size * ratio)]

    def check(self, stream: bytes) -> Report:
        """Whether the stream is a colour for every pixel and nothing else."""
        return codes.check(stream, self.image_size**2, len(self.colours))

    def grammar(
        self, tokens: Sequence[bytes], canonical: bool = False, in_range: bool = False
    ) -> codes.CodeGrammar:
        """See `codecs.base.Grammar`; every colour is canonical and in range."""
        del canonical, in_range
        return codes.CodeGrammar(tokens, self.image_size**2, len(self.colours))

    def to_file(self, stream: bytes) -> bytes:
        """The content of a .png file. Raises DecodeError."""
        buffer = io.BytesIO()
        self.decode(stream).save(buffer, format="PNG")
        return buffer.getvalue()

    def stored_bytes(self, length: int) -> float:
        """See `ImageCodec`."""
        return codes.stored_bytes(length, len(self.colours))

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for `get_codec`."""
        return {"name": self.name, "settings": asdict(self)}


def palette_text(colours: np.ndarray) -> str:
    """`PixelsCodec.palette` of colours, uint8 [colours, 3]."""
    return base64.b85encode(zlib.compress(np.ascontiguousarray(colours, np.uint8).tobytes(), 9)).decode()


def nearest(pixels: np.ndarray, colours: np.ndarray) -> np.ndarray:
    """The number of the nearest colour, int64 [n], of pixels [n, 3], both uint8; the first among equals."""
    # |p - c|^2 less the square of p, which is the same for all. In doubles such numbers are exact: ties are
    # ties on every machine, and the product of matrices is fast.
    palette = colours.astype(np.float64)
    squares = (palette**2).sum(axis=1)
    found = np.empty(len(pixels), np.int64)
    for start in range(0, len(pixels), 4096):
        part = pixels[start : start + 4096].astype(np.float64)
        found[start : start + 4096] = (squares - 2 * part @ palette.T).argmin(axis=1)
    return found
