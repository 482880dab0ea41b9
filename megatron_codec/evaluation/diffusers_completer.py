"""Completions by diffusion models from a local folder: the paper's other baselines.

Both are given what a prompt decides of a picture; the rest they see as grey, and are not told of it by a
network that looks at a pixel's neighbours. What was given stays as it is in the picture that is compared.
"""

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from megatron_codec.codecs import ImageCodec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.completers import Progress
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.samples import Sample
from megatron_codec.evaluation.upscaling import hash_folder, load_pipeline, random_numbers

BATCH = 8  # pictures at a time; the numbers that they begin at depend on it
GREY = 127
GUIDANCE = 1.0  # none: more takes two steps in place of one, and weighs no words against no words
KINDS = ("StableDiffusionInpaintPipeline", "StableDiffusionPipeline", "VQDiffusionPipeline")


@dataclass(frozen=True)
class DiffusersCompleter:
    """A pipeline of diffusers: `StableDiffusionInpaintPipeline` (Rombach et al., 2022; weights made for
    inpainting or not), or `VQDiffusionPipeline` (Gu et al., 2022), whose known codes are put back after each
    step. No words are given, and the safety checker, which blackens pictures, is left out.

    Args:
        folder: with a model_index.json.
        steps: of denoising.
        codec: whose prompts are given.

    Raises:
        UserError: the folder has no pipeline, or one of another kind.
    """

    folder: Path
    steps: int
    codec: ImageCodec

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise UserError(
                f"--diffusers {self.folder}",
                f"is a {self.kind}, and must be one of {', '.join(KINDS)}",
                "complete by a program of your own, and give its pictures by --pictures",
            )

    @cached_property
    def kind(self) -> str:
        """The class of the pipeline."""
        try:
            return json.loads((self.folder / "model_index.json").read_text())["_class_name"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            rule = "must be a folder with the model_index.json of a pipeline"
            raise UserError(f"--diffusers {self.folder}", rule, "save one by its save_pretrained") from error

    @property
    def name(self) -> str:
        """See `Completer`."""
        return self.folder.resolve().name

    @property
    def is_random(self) -> bool:
        """See `Completer`."""
        return True

    @cached_property
    def _hash(self) -> str:
        return hash_folder(self.folder)

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """See `Completer`."""
        codec = self.codec.to_dict()
        return {
            "pipeline_sha256": self._hash,
            "steps": self.steps,
            "guidance_scale": GUIDANCE,
            "codec": codec,
            "ratio": ratio,
            "seed": seed,
        }

    def complete(
        self, originals: Originals, numbers: range, ratio: float, seed: int, progress: Progress
    ) -> list[Sample]:
        """See `Completer`. The pipeline works at its own size; filters are bicubic."""
        given, size = originals.given(self.codec, ratio), originals.image_size
        samples = []
        for start in range(0, len(numbers), BATCH):
            batch = numbers[start : start + BATCH]
            whole = [originals.pictures[number] for number in batch]
            shown = [Image.fromarray(np.where(given[:, :, None], pixels, GREY)) for pixels in whole]
            make = self._inpaint if self._inpaints else self._fill
            made = make(shown, given, (seed << 32) + batch.start)
            for picture, pixels in zip(made, whole, strict=True):
                smaller = picture.convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
                samples.append(Sample.of_pixels(np.where(given[:, :, None], pixels, np.asarray(smaller))))
            progress(len(batch))
        return samples

    def release(self) -> None:
        """Gives the memory of the pipeline back."""
        self.__dict__.pop("_pipeline", None)

    @property
    def _inpaints(self) -> bool:
        return self.kind != "VQDiffusionPipeline"

    @cached_property
    def _pipeline(self) -> Any:
        if self._inpaints:
            return load_pipeline("StableDiffusionInpaintPipeline", self.folder, "--diffusers", _inpainting)
        return load_pipeline(self.kind, self.folder, "--diffusers", _vq_diffusion)

    def _inpaint(self, shown: Sequence[Image.Image], given: np.ndarray, seed: int) -> list[Image.Image]:
        pipeline = self._pipeline
        side = pipeline.unet.config.sample_size * pipeline.vae_scale_factor
        mask = Image.fromarray(np.where(given, 0, 255).astype(np.uint8))
        mask = mask.resize((side, side), Image.Resampling.NEAREST)
        made = pipeline(
            [""] * len(shown),
            image=[picture.resize((side, side), Image.Resampling.BICUBIC) for picture in shown],
            mask_image=[mask] * len(shown),
            height=side,
            width=side,
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=random_numbers(seed),
        )
        return made.images

    def _fill(self, shown: Sequence[Image.Image], given: np.ndarray, seed: int) -> list[Image.Image]:
        pipeline = self._pipeline
        network, transformer = pipeline.vqvae, pipeline.transformer
        factor = 2 ** (len(network.config.block_out_channels) - 1)
        size = (transformer.width * factor, transformer.height * factor)
        pixels = np.stack(
            [np.asarray(picture.resize(size, Image.Resampling.BICUBIC), np.float32) for picture in shown]
        )
        values = torch.from_numpy(pixels / 127.5 - 1).permute(0, 3, 1, 2).to(network.device)
        with torch.no_grad():
            codes = network.quantize(network.encode(values).latents)[2][2].reshape(len(shown), -1)
        # A code counts as given where all its pixels are.
        large = Image.fromarray(given).resize(size, Image.Resampling.NEAREST)
        blocks = np.asarray(large).reshape(transformer.height, factor, transformer.width, factor)
        known = torch.from_numpy(blocks.all(axis=(1, 3)).reshape(1, -1)).to(network.device)
        masked = transformer.num_vector_embeds - 1

        def keep(step: int, time: torch.Tensor, latents: torch.Tensor) -> None:
            latents.copy_(torch.where(known, codes, latents))

        made = pipeline(
            [""] * len(shown),
            num_inference_steps=self.steps,
            guidance_scale=GUIDANCE,
            generator=random_numbers(seed, network.device),
            latents=torch.where(known, codes, torch.full_like(codes, masked)),
            callback=keep,
        )
        return made.images


def _inpainting(pipeline: Any, folder: Path) -> Any:
    return pipeline.from_pretrained(
        folder, local_files_only=True, safety_checker=None, requires_safety_checker=False
    )


def _vq_diffusion(pipeline: Any, folder: Path) -> Any:
    # Part by part: releases of diffusers have the last class in different modules, and newer ones do not find
    # it by the name that older ones wrote down.
    import transformers

    diffusers: Any = sys.modules["diffusers"]
    words = "learned_classifier_free_sampling_embeddings"
    parts = {
        "vqvae": diffusers.VQModel,
        "transformer": diffusers.Transformer2DModel,
        "scheduler": diffusers.VQDiffusionScheduler,
        "text_encoder": transformers.CLIPTextModel,
        "tokenizer": transformers.CLIPTokenizer,
        words: sys.modules[pipeline.__module__].LearnedClassifierFreeSamplingEmbeddings,
    }
    loaded = {
        name: part.from_pretrained(folder / name, local_files_only=True) for name, part in parts.items()
    }
    return pipeline(**loaded)
