"""What completes pictures: references that need no model, and folders of finished pictures.

A completer is given real pictures and a prompt ratio and gives as many pictures. A checkpoint of ours is
`engine_completer.py`, one behind a server `server_completer.py`, models of diffusers are
`diffusers_completer.py`; another kind is one more class with what `Completer` asks for.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from PIL import Image, ImageFilter

from megatron_codec.codecs import ImageCodec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.samples import Sample
from megatron_codec.evaluation.upscaling import Upscaler
from megatron_codec.inference import Sampling

Progress = Callable[[int], object]
Reference = Literal["original", "others", "codec", "blurred", "noise"]
PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")


class Completer(Protocol):
    """Completes pictures.

    Attributes:
        name: its row in the tables.
        is_random: whether seeds make a difference; if not, one is enough.
    """

    @property
    def name(self) -> str:
        """See above."""
        ...

    @property
    def is_random(self) -> bool:
        """See above."""
        ...

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """What decides its pictures beside the originals, JSON values; hashed, it is the key of the cache."""
        ...

    def complete(
        self, originals: Originals, numbers: range, ratio: float, seed: int, progress: Progress
    ) -> list[Sample]:
        """A picture for each of some originals, in order.

        Args:
            numbers: which of the originals. In which parts a set is made is always the same.
            ratio: share of each that is given; 0 gives nothing.
            progress: called with the number of pictures just done.
        """
        ...

    def release(self) -> None:
        """Gives the memory of its models back."""
        ...


@dataclass(frozen=True)
class ReferenceCompleter:
    """Where a scale has its ends: the originals themselves (distance 0), other real pictures (how far as
    many real ones are from each other, which is what a perfect model has from nothing), either through a
    codec, blurred, and noise in place of what the prompt does not give.

    Args:
        codec: whose prompts are given, and which `kind` "codec" is about.
        label: what the codec is called in the tables; by default its name.
        upscaler: for a codec of smaller pictures than the originals.
        through: whether `kind` "others" goes through the codec too.
    """

    kind: Reference
    codec: ImageCodec
    label: str = ""
    upscaler: Upscaler = field(default_factory=Upscaler)
    through: bool = False

    def __post_init__(self) -> None:
        if self.kind not in get_args(Reference):
            raise UserError(f"reference '{self.kind}'", f"must be one of {', '.join(get_args(Reference))}")

    @property
    def name(self) -> str:
        """See `Completer`."""
        of = f", {self.label or self.codec.name}"
        names = {"codec": f"original{of}", "others": "other real ones" + (of if self.through else "")}
        return names.get(self.kind, self.kind)

    @property
    def is_random(self) -> bool:
        """See `Completer`."""
        return self.kind == "noise" or (self._encodes and self.upscaler.is_random)

    @property
    def _encodes(self) -> bool:
        return self.kind == "codec" or self.through

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """See `Completer`."""
        identity: dict[str, Any] = {"reference": self.kind}
        if self.kind not in ("original", "others") or self.through:
            identity |= {"codec": self.codec.to_dict()} | self.upscaler.identity
        if self.kind in ("blurred", "noise"):  # of the others the prompt is no other than the rest
            identity["ratio"] = ratio
        return identity | ({"seed": seed} if self.is_random else {})

    def complete(
        self, originals: Originals, numbers: range, ratio: float, seed: int, progress: Progress
    ) -> list[Sample]:
        """See `Completer`."""
        samples = []
        given = originals.given(self.codec, ratio)[:, :, None]
        shown = originals
        if self.kind == "others":
            if originals.others is None:
                raise UserError("reference 'others'", "needs as many pictures again", "give more --data")
            shown = originals.others
        for number in numbers:
            pixels = shown.pictures[number]
            if self._encodes:
                stream = shown.streams(self.codec)[number]
                noise = (seed << 32) + number
                sample = Sample.of_stream(self.codec, stream, stream, shown.image_size, self.upscaler, noise)
                errors = shown.active(sample.pixels()[None].astype(float)) - shown.active(pixels[None])
                known = sample.numbers | {"squared_error": float((errors**2).mean())}
                samples.append(replace(sample, numbers=known))
            else:
                rest = pixels
                if self.kind == "noise":
                    rest = np.random.default_rng([seed, number]).integers(
                        0, 256, pixels.shape, dtype=np.uint8
                    )
                elif self.kind == "blurred":
                    # A 16th of the side: of a 32-pixel picture a large part of what is in it stays.
                    blur = ImageFilter.GaussianBlur(originals.image_size / 16)
                    rest = np.asarray(Image.fromarray(pixels).filter(blur))
                samples.append(Sample.of_pixels(np.where(given, pixels, rest)))
            progress(1)
        return samples

    def release(self) -> None:
        """See `Completer`."""
        self.upscaler.release()


class FolderCompleter:
    """Pictures that another program has completed: `FOLDER/RATIO/*.png`, or `FOLDER/RATIO/SEED/*.png`, as in
    `sd/0.5/0/00000.png`. In the order of their names they belong to the originals, see `export`.

    Raises:
        UserError: there is no such folder.
    """

    def __init__(self, folder: Path):
        if not folder.is_dir():
            raise UserError(f"--pictures {folder}", "there is no such folder", "make FOLDER/RATIO")
        self.folder = folder

    @property
    def name(self) -> str:
        """See `Completer`."""
        return self.folder.name

    @property
    def is_random(self) -> bool:
        """See `Completer`: whether there is a folder for each seed."""
        return any(
            path.is_dir() for ratio in self.folder.iterdir() if ratio.is_dir() for path in ratio.iterdir()
        )

    def files(self, ratio: float, seed: int) -> list[Path]:
        """In the order of their names.

        Raises:
            UserError: there is no folder for this ratio or seed.
        """
        matching = [
            path for path in sorted(self.folder.iterdir()) if path.is_dir() and _number(path.name) == ratio
        ]
        if not matching:
            there = ", ".join(sorted(path.name for path in self.folder.iterdir())) or "nothing"
            rule = f"has no folder for the ratio {ratio:g} (there is: {there})"
            raise UserError(f"--pictures {self.folder}", rule, f"make {self.folder / f'{ratio:g}'}")
        folder = matching[0] / str(seed) if self.is_random else matching[0]
        if not folder.is_dir():
            raise UserError(
                f"--pictures {folder}", f"has no folder for the seed {seed}", "give it, or fewer --seeds"
            )
        return sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES)

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """See `Completer`: the content of the files."""
        digest = hashlib.sha256()
        for path in self.files(ratio, seed):
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return {"pictures_sha256": digest.hexdigest()}

    def complete(
        self, originals: Originals, numbers: range, ratio: float, seed: int, progress: Progress
    ) -> list[Sample]:
        """See `Completer`.

        Raises:
            UserError: one cannot be read or has another size.
        """
        samples = []
        for path in self.files(ratio, seed)[numbers.start : numbers.stop]:
            with self._opened(path, originals.image_size) as picture:
                try:
                    pixels = np.asarray(picture.convert("RGB"))
                except (OSError, SyntaxError, ValueError) as error:
                    raise _unreadable(path, error) from error
            samples.append(Sample.of_pixels(pixels))
            progress(1)
        return samples

    def release(self) -> None:
        """See `Completer`: there are none."""

    def check(self, originals: Originals, ratio: float, seed: int) -> None:
        """Raises UserError where there are not as many pictures as originals, or one has another size."""
        files = self.files(ratio, seed)
        if len(files) != len(originals):
            raise UserError(
                f"--pictures {self.folder}, ratio {ratio:g}: {len(files)} pictures",
                f"must be as many as the originals, {len(originals)}",
                "distances compare at equal numbers only; complete all, or change --num-samples",
            )
        for path in files:
            self._opened(path, originals.image_size).close()

    @staticmethod
    def _opened(path: Path, size: int) -> Image.Image:
        try:
            picture = Image.open(path)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            raise _unreadable(path, error) from error
        if picture.size != (size, size):
            picture.close()
            rule = f"must be {size}x{size} pixels, as the originals are"
            raise UserError(
                f"{path}: {picture.width}x{picture.height} pixels", rule, "resize all of them alike"
            )
        return picture


def row_name(name: str, sampling: Sampling) -> str:
    """A model's row in the tables: its name, and what of its sampling is not the rule."""
    cuts = [f"top-k {sampling.top_k}"] if sampling.top_k else []
    cuts += [f"top-p {sampling.top_p:g}"] if sampling.top_p < 1 else []
    cuts += [f"temperature {sampling.temperature:g}"] if sampling.temperature != 1 else []
    cuts += [] if sampling.constrained else ["no grammar"]
    return ", ".join([name, *cuts])


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(f"{path}", f"cannot be read: {error}", "give a whole picture")


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
