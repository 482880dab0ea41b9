"""A completed picture as a file, with what is known of the stream that it was decoded from."""

import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from megatron_codec.codecs import DecodeError, ImageCodec
from megatron_codec.evaluation.upscaling import Upscaler

BROKEN = ".broken"


@dataclass(frozen=True)
class Sample:
    """One completed picture.

    Attributes:
        content: of its file; what no viewer opens is kept under the suffix `.broken`.
        suffix: of its file.
        numbers: what is known of it beside the pixels, see `of_stream`.
    """

    content: bytes
    suffix: str
    numbers: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of_pixels(cls, pixels: np.ndarray) -> "Sample":
        """Of RGB pixels, uint8 [height, width, 3], without loss."""
        return cls(_png(Image.fromarray(pixels)), ".png")

    @classmethod
    def of_stream(
        cls, codec: ImageCodec, stream: bytes, real: bytes, image_size: int, upscaler: Upscaler, seed: int
    ) -> "Sample":
        """Of a codec's stream: the codec's own file, or what the upscaler makes of a smaller picture.

        Args:
            real: the stream of the original.
            image_size: side of the originals in pixels.
            seed: of the upscaler's noise, another one for each picture.

        Returns:
            A sample with the numbers `bytes` of the stream, `real_bytes` of the original's, the same of the
            codec's files where it writes such, whether it is strictly `valid`, and whether it `decodes`.
        """
        numbers = {
            "bytes": stored_bytes(codec, len(stream)),
            "real_bytes": stored_bytes(codec, len(real)),
            "valid": codec.check(stream).valid,
            "decodes": True,
        }
        try:
            picture = codec.decode(stream)
        except DecodeError:
            return cls(stream, BROKEN, numbers | {"decodes": False})
        file = codec.to_file(stream)
        numbers |= file_sizes(codec, file, real)
        if codec.image_size == image_size:
            return cls(file, codec.file_suffix, numbers)
        return cls(_png(upscaler(picture, image_size, seed)), ".png", numbers)

    def pixels(self) -> np.ndarray:
        """RGB, uint8 [height, width, 3]."""
        with Image.open(io.BytesIO(self.content)) as picture:
            return np.asarray(picture.convert("RGB"))


def stored_bytes(codec: ImageCodec, length: int) -> float:
    """Bytes that a stream of so many stands for, see `ImageCodec`."""
    own = getattr(codec, "stored_bytes", None)
    return own(length) if own else length


def file_sizes(codec: ImageCodec, file: bytes, real: bytes) -> dict[str, int]:
    """Bytes of a codec's file and of that of the original's stream; none where files are no more than
    pictures without loss."""
    if hasattr(codec, "stored_bytes"):
        return {}
    return {"file_bytes": len(file), "real_file_bytes": len(codec.to_file(real))}


def _png(picture: Image.Image) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()
