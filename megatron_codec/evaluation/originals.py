"""The real pictures of an evaluation, and how much of them a prompt gives."""

import hashlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.images import Geometry, canonical
from megatron_codec.errors import UserError
from megatron_codec.evaluation.distances import rank_problem
from megatron_codec.preprocessing import Selection, open_inputs
from megatron_codec.preprocessing.decoders import PillowDecoder, picture_suffixes
from megatron_codec.preprocessing.skipping import Skipped


@dataclass(frozen=True)
class Originals:
    """Real pictures.

    Attributes:
        names: where each comes from.
        pictures: RGB, uint8 [n, image_size, image_size, 3], before any codec.
        skipped: what could not be read.
        half_size: whether the pictures lie at half size in the middle of black ones; distances are then
            taken of that part alone.
    """

    names: tuple[str, ...]
    pictures: np.ndarray
    skipped: tuple[Skipped, ...] = ()
    half_size: bool = False
    _streams: dict[str, list[bytes]] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return len(self.pictures)

    @property
    def image_size(self) -> int:
        """Side of the pictures in pixels."""
        return self.pictures.shape[1]

    def streams(self, codec: ImageCodec) -> list[bytes]:
        """What a codec makes of each, at its own size."""
        key = json.dumps(codec.to_dict())
        if key not in self._streams:
            self._streams[key] = [codec.encode(picture) for picture in self.pictures]
        return self._streams[key]

    @cached_property
    def hash(self) -> str:
        """SHA-256 of the pixels of all, in order."""
        return hashlib.sha256(np.ascontiguousarray(self.pictures).data).hexdigest()

    def given(self, codec: ImageCodec, ratio: float) -> np.ndarray:
        """Which pixels a prompt of this ratio decides, bool [image_size, image_size]."""
        given = Image.fromarray(given_pixels(codec, ratio))
        return np.asarray(given.resize((self.image_size, self.image_size), Image.Resampling.NEAREST))

    def active(self, pictures: np.ndarray) -> np.ndarray:
        """Of pictures [n, image_size, image_size, 3] what distances are taken of."""
        start, side = half_box(self.image_size)
        part = slice(start, start + side) if self.half_size else slice(None)
        return pictures[:, part, part]


def half_box(image_size: int) -> tuple[int, int]:
    """Where a picture at half size begins, from the left and from above, and its side, in pixels."""
    side = image_size // 2
    return (image_size - side) // 2, side


def given_pixels(codec: ImageCodec, ratio: float) -> np.ndarray:
    """Where a white and a black picture differ when the decoder has their prompts alone."""
    side = codec.image_size
    shown = []
    for value in (0, 255):
        stream = codec.encode(np.full((side, side, 3), value, np.uint8))
        shown.append(np.asarray(codec.decode(codec.prompt(stream, ratio))))
    return (shown[0] != shown[1]).any(axis=2)


def check_ratios(codec: ImageCodec, ratios: tuple[float, ...]) -> list[UserError]:
    """What is wrong with prompt ratios for this codec: each has to give another, proper part of a picture."""
    faults, seen = [], {}
    for ratio in ratios:
        flag = f"--ratios {ratio}"
        if not 0 <= ratio < 1:
            remedy = "use 0.5 for the upper half, 0 for pictures from nothing"
            faults.append(UserError(flag, "must be at least 0 and below 1", remedy))
            continue
        count = int(given_pixels(codec, ratio).sum())
        if ratio > 0 and count == 0:
            rule = f"gives not even one patch of {codec.image_size}x{codec.image_size} pixels"
            faults.append(UserError(flag, rule, "use a larger one, or 0 for pictures from nothing"))
        elif count in seen:
            rule = f"gives the same prompts as {seen[count]}"
            faults.append(UserError(flag, rule, "leave one of the two out"))
        seen.setdefault(count, ratio)
    return faults


def read_originals(
    selection: Selection,
    image_size: int,
    geometry: Geometry,
    dimensions: int,
    progress: Callable[[int], object] = lambda count: None,
    half_size: bool = False,
) -> Originals:
    """Reads `selection.limit` pictures as preprocessing reads them, evenly spread over all that there are.

    Args:
        image_size: side that they get.
        dimensions: features of a picture, for what is said where there are too few pictures.
        half_size: whether they are put at half size into the middle of black pictures.

    Raises:
        UserError: there are fewer, none can be read, or an input does not exist.
    """
    start, side = half_box(image_size) if half_size else (0, image_size)

    def pixels_needed(width: int, height: int) -> tuple[int, int]:
        return geometry.pixels_needed(width, height, side)

    names, pictures, skipped = [], [], []
    with tempfile.TemporaryDirectory() as spool:
        source = open_inputs(selection, picture_suffixes(), Path(spool))
        for item, read in PillowDecoder().decode(source, pixels_needed):
            try:
                if isinstance(read, Exception):
                    raise read
                media = cast("Image.Image | np.ndarray", read)
                picture = canonical(media, side, geometry, item.name)
            except MemoryError:
                raise
            except Exception as error:
                skipped.append(Skipped.because(item, error))
                continue
            names.append(item.name)
            whole = np.zeros((image_size, image_size, 3), np.uint8)
            whole[start : start + side, start : start + side] = np.asarray(picture)
            pictures.append(whole)
            progress(1)
    data, wanted = " ".join(map(str, selection.inputs)), selection.limit or 1
    found = len(pictures) + len(skipped)
    if not pictures:
        raise UserError(
            f"--data {data}",
            f"none of {found} pictures can be read, first {skipped[0].name}: {skipped[0].reason}",
        )
    if found < wanted:
        problem = rank_problem(found, dimensions)
        raise UserError(
            f"--num-samples {wanted}",
            f"there are only {found} pictures in {data}",
            f"give more pictures, or --num-samples {found}" + (f" (but {problem})" if problem else ""),
        )
    return Originals(tuple(names), np.stack(pictures), tuple(skipped), half_size)
