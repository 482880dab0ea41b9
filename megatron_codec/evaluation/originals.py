"""The real pictures of an evaluation, and how much of them a prompt gives."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
from PIL import Image

from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.given import given_pixels, prompt_picture
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
        others: as many other real pictures; None where there are not as many.
    """

    names: tuple[str, ...]
    pictures: np.ndarray
    skipped: tuple[Skipped, ...] = ()
    half_size: bool = False
    others: "Originals | None" = None
    _streams: dict[str, list[bytes]] = field(default_factory=dict, compare=False, repr=False)
    _given: dict[tuple[str, float], np.ndarray] = field(default_factory=dict, compare=False, repr=False)

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
        given = Image.fromarray(self._given_of_codec(codec, ratio))
        return np.asarray(given.resize((self.image_size, self.image_size), Image.Resampling.NEAREST))

    def prompt(self, codec: ImageCodec, number: int, ratio: float) -> Image.Image:
        """What a prompt of one of them decides; a decoder makes up more where it ends, which is grey."""
        prompt = codec.prompt(self.streams(codec)[number], ratio)
        shown = prompt_picture(codec, prompt, self._given_of_codec(codec, ratio))
        return shown.resize((self.image_size, self.image_size), Image.Resampling.NEAREST)

    def _given_of_codec(self, codec: ImageCodec, ratio: float) -> np.ndarray:
        key = json.dumps(codec.to_dict()), ratio
        if key not in self._given:
            self._given[key] = given_pixels(codec, ratio)
        return self._given[key]

    def active(self, pictures: np.ndarray) -> np.ndarray:
        """Of pictures [n, image_size, image_size, 3] what distances are taken of."""
        start, side = half_box(self.image_size)
        part = slice(start, start + side) if self.half_size else slice(None)
        return pictures[:, part, part]


def half_box(image_size: int) -> tuple[int, int]:
    """Where a picture at half size begins, from the left and from above, and its side, in pixels."""
    side = image_size // 2
    return (image_size - side) // 2, side


def check_ratios(codec: ImageCodec, ratios: tuple[float, ...], half_size: bool = False) -> list[UserError]:
    """What is wrong with prompt ratios for this codec: each has to give another, proper part of a picture.

    Args:
        half_size: whether pictures lie in the middle of black ones; the part is one of that middle then.
    """
    start, side = half_box(codec.image_size) if half_size else (0, codec.image_size)
    what = "the picture in the middle of the black one" if half_size else "the picture"
    faults, seen = [], {}
    for ratio in ratios:
        flag = f"--ratios {ratio}"
        if not 0 <= ratio < 1:
            remedy = "use 0.5 for the upper half, 0 for pictures from nothing"
            faults.append(UserError(flag, "must be at least 0 and below 1", remedy))
            continue
        count = int(given_pixels(codec, ratio)[start : start + side, start : start + side].sum())
        if ratio > 0 and count == 0:
            rule = f"gives not even one patch of {what} ({side}x{side} pixels, codec {codec.name})"
            faults.append(UserError(flag, rule, "use a larger one, or 0 for pictures from nothing"))
        elif count == side * side:
            rule = f"gives all of {what} ({side}x{side} pixels, codec {codec.name})"
            faults.append(UserError(flag, rule, "use a smaller one; nothing would be left to complete"))
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
    others: bool = False,
    least: int = 1,
) -> Originals:
    """Reads `selection.limit` pictures as preprocessing reads them, evenly spread over all that there are.

    Args:
        image_size: side that they get.
        dimensions: features of a picture, for what is said where there are too few pictures.
        half_size: whether they are put at half size into the middle of black pictures.
        others: whether as many other pictures are wanted too, each from between two of the first.
        least: how many have to be readable.

    Raises:
        UserError: there are fewer, too few can be read, or an input does not exist.
    """
    wanted = selection.limit or 1
    # Of twice as many evenly spread every second one is one of the first.
    read = _read(
        replace(selection, limit=2 * wanted) if others else selection,
        image_size,
        geometry,
        half_size,
        progress,
    )
    chosen = {i * len(read) // wanted for i in range(wanted)}
    first = _collected([one for i, one in enumerate(read) if i in chosen], half_size)
    _check(selection, first, min(len(read), wanted), dimensions, least)
    second = [one for i, one in enumerate(read) if i not in chosen and isinstance(one[1], np.ndarray)]
    if others and len(second) >= len(first):
        return replace(first, others=_collected(second[: len(first)], half_size))
    return first


def _read(
    selection: Selection,
    image_size: int,
    geometry: Geometry,
    half_size: bool,
    progress: Callable[[int], object],
) -> list[tuple[str, np.ndarray | Skipped]]:
    """Each by its name, in order, or why it is left out."""
    start, side = half_box(image_size) if half_size else (0, image_size)

    def pixels_needed(width: int, height: int) -> tuple[int, int]:
        return geometry.pixels_needed(width, height, side)

    found: list[tuple[str, np.ndarray | Skipped]] = []
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
                found.append((item.name, Skipped.because(item, error)))
                continue
            whole = np.zeros((image_size, image_size, 3), np.uint8)
            whole[start : start + side, start : start + side] = np.asarray(picture)
            found.append((item.name, whole))
            progress(1)
    return found


def _collected(found: Sequence[tuple[str, np.ndarray | Skipped]], half_size: bool) -> Originals:
    pictures = [one for _, one in found if isinstance(one, np.ndarray)]
    names = tuple(name for name, one in found if isinstance(one, np.ndarray))
    skipped = tuple(one for _, one in found if isinstance(one, Skipped))
    stacked = np.stack(pictures) if pictures else np.zeros((0, 1, 1, 3), np.uint8)
    return Originals(names, stacked, skipped, half_size)


def _check(selection: Selection, originals: Originals, found: int, dimensions: int, least: int) -> None:
    """Raises UserError where there are too few pictures."""
    data, wanted = " ".join(map(str, selection.inputs)), selection.limit or 1
    if len(originals) < least and originals.skipped:
        first = originals.skipped[0]
        can = f"only {len(originals)}" if len(originals) else "none"
        raise UserError(
            f"--data {data}",
            f"{can} of {found} pictures can be read, first not {first.name}: {first.reason}",
            f"give at least {least} that can",
        )
    if found < wanted:
        problem = rank_problem(found, dimensions)
        raise UserError(
            f"--num-samples {wanted}",
            f"there are only {found} pictures in {data}",
            f"give more pictures, or --num-samples {found}" + (f" (but {problem})" if problem else ""),
        )
