"""Stable Diffusion and VQ-Diffusion as completers: the pipelines of diffusers, small, with random weights."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.diffusers_completer import BATCH, DiffusersCompleter
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.evaluate_config import EvaluateConfig
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.upscaling import random_numbers
from tests.data_sources import photo_crops
from tests.unit.test_evaluation_protocol import Blocks

CODEC = JpegCodec(32)
STEPS = 2


@pytest.fixture(scope="module")
def originals() -> Originals:
    pictures = np.stack([np.asarray(crop) for crop in photo_crops(10, 32)])
    return Originals(tuple(map(str, range(10))), pictures)


def text_parts(folder) -> dict:
    """A text encoder and a tokenizer of a few words."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = ["<|startoftext|>", "<|endoftext|>", *"abc", *(f"{letter}</w>" for letter in "abc")]
    (folder / "vocab.json").write_text(json.dumps({word: number for number, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=8)
    encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(words), hidden_size=32, intermediate_size=37, num_hidden_layers=1,
            num_attention_heads=4, max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1,
        )
    )  # fmt: skip
    return {"text_encoder": encoder.eval(), "tokenizer": tokenizer}


def save_stable_diffusion(folder, channels: int) -> None:
    """Of 32 pixels; with 9 channels made for inpainting, with 4 not."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionInpaintPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=channels, out_channels=4, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), cross_attention_dim=32,
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    vae = AutoencoderKL(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
        up_block_types=("UpDecoderBlock2D",) * 2, sample_size=32,
    )  # fmt: skip
    StableDiffusionInpaintPipeline(
        vae=vae, unet=unet, scheduler=DDIMScheduler(), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False, **text_parts(folder.parent),
    ).save_pretrained(folder)  # fmt: skip


def save_vq_diffusion(folder, learned: torch.Tensor | None = None) -> None:
    """Pictures of 16 pixels as 8x8 codes out of 24.

    Args:
        learned: what guidance compares no words with, [8, 32]; by default no words.
    """
    from diffusers import Transformer2DModel, VQDiffusionPipeline, VQDiffusionScheduler, VQModel
    from diffusers.pipelines.deprecated.vq_diffusion.pipeline_vq_diffusion import (
        LearnedClassifierFreeSamplingEmbeddings,
    )

    torch.manual_seed(0)
    if learned is None:
        words = LearnedClassifierFreeSamplingEmbeddings(False)
    else:
        words = LearnedClassifierFreeSamplingEmbeddings(True, *reversed(learned.shape))
        words.embeddings.data = learned
    network = VQModel(
        block_out_channels=(32, 64), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=3,
        up_block_types=("UpDecoderBlock2D",) * 2, num_vq_embeddings=24, vq_embed_dim=3,
    )  # fmt: skip
    transformer = Transformer2DModel(
        num_attention_heads=2, attention_head_dim=12, num_vector_embeds=25, sample_size=8, num_layers=1,
        cross_attention_dim=32, attention_bias=True, norm_type="ada_norm", num_embeds_ada_norm=STEPS,
    )  # fmt: skip
    VQDiffusionPipeline(
        vqvae=network, transformer=transformer, scheduler=VQDiffusionScheduler(25, num_train_timesteps=STEPS),
        learned_classifier_free_sampling_embeddings=words, **text_parts(folder.parent),
    ).save_pretrained(folder)  # fmt: skip


@pytest.fixture(scope="module", params=["inpaint", "stable", "vq"])
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / request.param
    if request.param == "vq":
        save_vq_diffusion(folder)
    else:
        save_stable_diffusion(folder, 9 if request.param == "inpaint" else 4)
    return folder


def pixels(samples) -> np.ndarray:
    return np.stack([sample.pixels() for sample in samples])


def test_what_is_given_stays_and_the_rest_is_made(folder, originals):
    completer = DiffusersCompleter(folder, STEPS, CODEC)
    done = []
    made = pixels(completer.complete(originals, range(10), 0.5, 0, done.append))
    assert made.shape == originals.pictures.shape and made.dtype == np.uint8 and done == [BATCH, 2]
    assert (made[:, :16] == originals.pictures[:, :16]).all()
    assert (made[:, 16:] != originals.pictures[:, 16:]).mean() > 0.8
    assert len({picture[16:].tobytes() for picture in made}) == 10
    again = pixels(DiffusersCompleter(folder, STEPS, CODEC).complete(originals, range(10), 0.5, 0, len_of))
    assert (made == again).all()
    other = pixels(completer.complete(originals, range(BATCH), 0.5, 1, len_of))
    assert (made[:BATCH, 16:] != other[:, 16:]).mean() > 0.5
    completer.release()


def test_nothing_of_what_is_not_given_is_seen(folder, originals):
    changed = originals.pictures.copy()
    changed[:, 16:] = 255 - changed[:, 16:]
    upside_down = Originals(originals.names, changed)
    completer = DiffusersCompleter(folder, STEPS, CODEC)
    for ratio, given in ((0.5, 16), (0, 0)):
        first, second = (
            pixels(completer.complete(which, range(3), ratio, 0, len_of))
            for which in (originals, upside_down)
        )
        assert (first[:, given:] == second[:, given:]).all()


@pytest.mark.parametrize("folder", ["vq"], indirect=True)
def test_known_codes_are_there_in_the_end(folder, originals, monkeypatch):
    completer = DiffusersCompleter(folder, STEPS, CODEC)
    quantize = completer._pipeline.vqvae.quantize
    entry, seen = quantize.get_codebook_entry, []

    def recorded(codes, shape):
        seen.append(codes.clone())
        return entry(codes, shape)

    monkeypatch.setattr(quantize, "get_codebook_entry", recorded)
    completer.complete(originals, range(3), 0.5, 0, len_of)
    [codes] = seen
    grey = originals.pictures[:3].copy()
    grey[:, 16:] = 127
    small = np.stack([np.asarray(Image.fromarray(p).resize((16, 16), 3), np.float32) for p in grey])
    with torch.no_grad():
        latents = completer._pipeline.vqvae.encode(torch.from_numpy(small / 127.5 - 1).permute(0, 3, 1, 2))
        expected = quantize(latents.latents)[2][2].reshape(3, 8, 8)
    codes = codes.reshape(3, 8, 8)
    assert (codes[:, :4] == expected[:, :4]).all() and (codes[:, 4:] != expected[:, 4:]).any()
    assert codes.max() < 24  # none is masked


@pytest.mark.parametrize("folder", ["inpaint", "stable"], indirect=True)
def test_stable_diffusion_is_asked_as_by_hand(folder, originals):
    from diffusers import StableDiffusionInpaintPipeline

    pipeline = StableDiffusionInpaintPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.set_progress_bar_config(disable=True)
    grey = originals.pictures[:2].copy()
    grey[:, 16:] = 127
    mask = Image.fromarray(np.repeat(np.uint8([0] * 16 + [255] * 16)[:, None], 32, axis=1))
    by_hand = pipeline(
        ["", ""], image=[Image.fromarray(p) for p in grey], mask_image=[mask, mask], height=32, width=32,
        num_inference_steps=STEPS, guidance_scale=1, generator=random_numbers((5 << 32) + 4),
    ).images  # fmt: skip
    shifted = Originals(originals.names, np.roll(originals.pictures, 4, axis=0))
    made = pixels(DiffusersCompleter(folder, STEPS, CODEC).complete(shifted, range(4, 6), 0.5, 5, len_of))
    assert (made[:, 16:] == np.stack([np.asarray(p) for p in by_hand])[:, 16:]).all()


def test_vq_diffusion_is_not_guided(originals, tmp_path):
    """Where no words and the learned ones differ, guidance does something."""
    save_vq_diffusion(tmp_path / "vq", 10 * torch.randn(8, 32, generator=torch.Generator().manual_seed(0)))
    completer = DiffusersCompleter(tmp_path / "vq", STEPS, CODEC)
    made = pixels(completer.complete(originals, range(2), 0, 5, len_of))
    found = {}
    for guidance in (1.0, 5.0):
        noise = random_numbers(5 << 32)
        by_hand = completer._pipeline(
            ["", ""], num_inference_steps=STEPS, guidance_scale=guidance, generator=noise
        ).images
        larger = [picture.resize((32, 32), Image.Resampling.BICUBIC) for picture in by_hand]
        found[guidance] = np.stack([np.asarray(picture) for picture in larger])
    assert (made == found[1.0]).all() and (made != found[5.0]).mean() > 0.1
    assert completer.identity(0, 5)["guidance_scale"] == 1


def test_an_evaluation_has_a_row_for_it(folder, tmp_path):
    (tmp_path / "photos").mkdir()
    for number, crop in enumerate(photo_crops(10, 32)):
        crop.save(tmp_path / "photos" / f"{number}.png")
    wanted = EvaluateConfig(
        data=(tmp_path / "photos",), output=tmp_path / "out", diffusers=(folder,), diffusion_steps=STEPS,
        ratios=(0.5,), num_samples=10, seeds=2, image_size=32, references=("original",),
    )  # fmt: skip
    first, second = evaluate(wanted, Blocks())["rows"]
    assert (first["completer"], second["completer"]) == (folder.name, "original")
    assert len(first["sets"]) == 2 and first["numbers"]["frechet"]["mean"] > 0


def test_other_folders_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"must be a folder with the model_index\.json"):
        DiffusersCompleter(tmp_path, STEPS, CODEC)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    with pytest.raises(UserError, match=r"is a FluxPipeline, and must be one of StableDiffusionInpaint"):
        DiffusersCompleter(tmp_path, STEPS, CODEC)
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": "VQDiffusionPipeline"}))
    broken = DiffusersCompleter(tmp_path, STEPS, CODEC)
    with pytest.raises(UserError, match="holds no VQDiffusionPipeline"):
        broken.complete(Originals(("a",), np.zeros((1, 32, 32, 3), np.uint8)), range(1), 0.5, 0, len_of)


def len_of(count: int) -> None:
    """Shows no progress."""
