"""What of a picture a prompt decides: the pixels, and the prompt to look at."""

import numpy as np
from PIL import Image

from megatron_codec.codecs.base import ImageCodec

_GREY = 128


def given_pixels(codec: ImageCodec, ratio: float) -> np.ndarray:
    """Where a white and a black picture differ when the decoder has their prompts alone: bool [image_size,
    image_size]."""
    side = codec.image_size
    shown = []
    for value in (0, 255):
        stream = codec.encode(np.full((side, side, 3), value, np.uint8))
        shown.append(np.asarray(codec.decode(codec.prompt(stream, ratio))))
    return (shown[0] != shown[1]).any(axis=2)


def prompt_picture(codec: ImageCodec, prompt: bytes, given: np.ndarray) -> Image.Image:
    """What a prompt decides of its picture, RGB; a decoder makes up more where it ends, which is grey.

    Args:
        prompt: what `Codec.prompt` returns.
        given: `given_pixels` of its ratio.
    """
    decoded = np.asarray(codec.decode(prompt).convert("RGB"))
    return Image.fromarray(np.where(given[:, :, None], decoded, _GREY).astype(np.uint8))
