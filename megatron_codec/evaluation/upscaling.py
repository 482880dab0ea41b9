"""How pictures of a model that writes small ones come to the size that they are compared at."""

import gc
import hashlib
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_codec.errors import UserError

FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}


@dataclass(frozen=True)
class Upscaler:
    """A filter, or a super-resolution model: `LDMSuperResolutionPipeline` of diffusers (Rombach et al.,
    2022), which makes pictures four times as large, as often as is needed; the rest is a bicubic filter's.

    Args:
        method: "nearest", "bicubic", "lanczos", or the folder of a pipeline.
        steps: of denoising.

    Raises:
        UserError: for another word that is no folder of a pipeline.
    """

    method: str = "bicubic"
    steps: int = 100
    _one: threading.Lock = field(default_factory=threading.Lock, init=False, compare=False, repr=False)

    def __post_init__(self) -> None:
        if self.method not in FILTERS and not (Path(self.method) / "model_index.json").is_file():
            raise UserError(
                f"--upscale {self.method}",
                f"must be one of {', '.join(FILTERS)}, or a folder with a model_index.json",
                "give the folder of an LDMSuperResolutionPipeline of diffusers",
            )

    @property
    def is_random(self) -> bool:
        """Whether seeds make a difference."""
        return self.method not in FILTERS

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What decides its pictures beside their seeds, JSON values."""
        if not self.is_random:
            return {"upscale": self.method}
        return {
            "upscale_sha256": hash_folder(Path(self.method)),
            "steps": self.steps,
            "noise": "(seed << 32) + number",  # of `__call__`, as its callers give it
        }

    def __call__(self, picture: Image.Image, image_size: int, seed: int) -> Image.Image:
        """An RGB picture of image_size x image_size pixels; any thread may ask for it.

        Args:
            seed: of the noise that denoising begins at. Completers give `(seed << 32) + number`, of the set
                and the picture, so that no two pictures of a row have the same noise.
        """
        if self.is_random and picture.width < image_size:
            noise = random_numbers(seed)
            with self._one:  # a pipeline's scheduler knows of one picture at a time
                while picture.width < image_size:
                    side = -(-picture.width // 32) * 32
                    picture = picture.resize((side, side), Image.Resampling.BICUBIC)
                    made = self._pipeline(picture, num_inference_steps=self.steps, generator=noise)
                    picture = made.images[0]
        way = FILTERS.get(self.method, Image.Resampling.BICUBIC)
        return picture.convert("RGB").resize((image_size, image_size), way)

    def release(self) -> None:
        """Gives the memory of the pipeline back; it is loaded again when it is needed again."""
        if self.__dict__.pop("_pipeline", None) is not None:
            gc.collect()

    @cached_property
    def _pipeline(self) -> Any:
        return load_pipeline("LDMSuperResolutionPipeline", Path(self.method), "--upscale")


def random_numbers(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """Of a seed of any number of bits, not negative. Torch's own on a CPU are the same for all seeds with the
    same last 32 bits."""
    mixed = np.random.SeedSequence(seed).generate_state(1, np.uint64)
    return torch.Generator(device).manual_seed(int(mixed[0]))


def from_folder(pipeline: Any, folder: Path) -> Any:
    """All its parts as the folder has them."""
    return pipeline.from_pretrained(folder, local_files_only=True)


def load_pipeline(kind: str, folder: Path, flag: str, load: Callable[[Any, Path], Any] = from_folder) -> Any:
    """A pipeline of diffusers from a local folder, on the GPU where there is one; nothing is downloaded.

    Args:
        kind: name of its class.
        flag: that named the folder.
        load: makes the pipeline, given the class and the folder.

    Raises:
        UserError: diffusers is not installed, or the folder holds another or a broken pipeline.
    """
    try:
        import diffusers
    except ImportError as error:
        remedy = "pip install 'megatron_codec[eval]'"
        raise UserError("diffusers", f"is needed for {flag} and not installed", remedy) from error
    try:
        pipeline = load(getattr(diffusers, kind), folder)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{flag} {folder}", f"holds no {kind}: {reason}", "give another folder") from error
    pipeline.set_progress_bar_config(disable=True)
    return pipeline.to("cuda" if torch.cuda.is_available() else "cpu")


def hash_folder(folder: Path) -> str:
    """SHA-256 of the names and contents of all files below a folder."""
    digest = hashlib.sha256()
    for file in sorted(path for path in folder.rglob("*") if path.is_file()):
        content = hashlib.sha256()
        with open(file, "rb") as stream:
            while part := stream.read(2**24):
                content.update(part)
        digest.update(f"{file.relative_to(folder)} {content.hexdigest()}\n".encode())
    return digest.hexdigest()
