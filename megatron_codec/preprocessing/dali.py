"""JPEG files to pixels with NVIDIA DALI, on a GPU or on the CPU.

DALI decodes in batches; what is not a grey or RGB JPEG file goes to Pillow, and so does a batch in which
DALI finds a fault, so that the fault is named. On the CPU the pixels are those of Pillow (both ask
libjpeg-turbo); on a GPU nvJPEG decodes, and they differ a little.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from itertools import islice
from typing import Any, Literal

import numpy as np
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.preprocessing.decoders import (
    MAX_PIXELS,
    Picture,
    PillowDecoder,
    open_picture,
    pillow_versions,
)
from megatron_codec.preprocessing.sources import Item

BATCH = 16
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class DaliDecoder:
    """Decodes JPEG files with DALI, whole, and everything else with Pillow.

    Args:
        device: `cpu`, or `gpu` for nvJPEG on the current GPU.
        max_pixels: pictures with more are refused.

    Raises UserError where DALI is not installed.
    """

    device: Literal["cpu", "gpu"] = "cpu"
    max_pixels: int = MAX_PIXELS

    def __post_init__(self) -> None:
        _dali()

    def decode(
        self, items: Iterable[Item], pixels_needed: Callable[[int, int], tuple[int, int]]
    ) -> Iterator[tuple[Item, Picture | Exception]]:
        """See `Decoder`. Pictures are never reduced."""
        iterator = iter(items)
        while batch := [(item, self._prepared(item)) for item in islice(iterator, BATCH)]:
            found: dict[int, Picture | Exception] = {}
            jpegs = {i: content for i, (_, content) in enumerate(batch) if isinstance(content, bytes)}
            if jpegs:
                found = dict(zip(jpegs, self._decoded(list(jpegs.values())), strict=True))
            for i, (item, content) in enumerate(batch):
                yield item, content if not isinstance(content, bytes) else found[i]

    def _prepared(self, item: Item) -> bytes | Picture | Exception:
        """The bytes of a file for DALI; a picture or fault where there is nothing for it to do."""
        try:
            content = item.read()
            if isinstance(content, np.ndarray):
                return content
            image = open_picture(content, self.max_pixels)
            if image.format == "JPEG" and image.mode in ("L", "RGB"):
                return content
            image.load()
            return image
        except MemoryError:
            raise
        except Exception as error:
            return error

    def _decoded(self, contents: list[bytes]) -> Iterator[Picture | Exception]:
        try:
            arrays = _decode_batch(contents, self.device)
        except RuntimeError:  # one of them is broken; Pillow says which
            _pipeline.cache_clear()
            pillow = PillowDecoder(self.max_pixels, scaled_decode=False)
            items = (Item("", "", 0, lambda content=content: content) for content in contents)
            yield from (picture for _, picture in pillow.decode(items, lambda *size: size))
            return
        for content, array in zip(contents, arrays, strict=True):
            image = Image.fromarray(array)
            exif = open_picture(content, self.max_pixels).info.get("exif")
            if exif:  # DALI leaves the picture as it lies; `images.canonical` turns it
                image.info["exif"] = exif
            yield image

    def settings(self) -> dict[str, Any]:
        """See `Decoder`."""
        return {"name": "dali"} | asdict(self)

    def versions(self) -> dict[str, str]:
        """See `Decoder`."""
        return {"dali": _dali().__version__} | pillow_versions()


def _decode_batch(contents: list[bytes], device: str) -> list[np.ndarray]:
    """The RGB pictures in JPEG files, uint8 [height, width, 3]."""
    pipeline = _pipeline(device)
    padded = contents + [contents[-1]] * (BATCH - len(contents))
    pipeline.feed_input("files", [np.frombuffer(content, np.uint8) for content in padded])
    (decoded,) = pipeline.run()
    if device == "gpu":
        decoded = decoded.as_cpu()
    return [np.array(decoded.at(i)) for i in range(len(contents))]


@cache
def _pipeline(device: str):
    from nvidia.dali import fn, pipeline_def, types  # pyright: ignore[reportMissingImports]

    # One batch at a time, in the order of the calls: pictures are wanted one by one.
    @pipeline_def(
        batch_size=BATCH,
        num_threads=1,
        device_id=0 if device == "gpu" else None,
        prefetch_queue_depth=1,
        exec_pipelined=False,
        exec_async=False,
    )
    def decode():
        files = fn.external_source(name="files", dtype=types.UINT8, ndim=1)
        return fn.decoders.image(
            files,
            device="mixed" if device == "gpu" else "cpu",
            output_type=types.RGB,
            adjust_orientation=False,
        )

    pipeline = decode()
    pipeline.build()
    return pipeline


def _dali():
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import nvidia.dali  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        remedy = "pip install 'megatron_codec[dali]', or use --decoder pillow"
        raise UserError("--decoder dali", f"NVIDIA DALI cannot be imported: {error}", remedy) from error
    return nvidia.dali
