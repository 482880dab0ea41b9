"""Proof that two folders are one model: logits, ids, files."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_codec import parallel
from megatron_codec.codecs import AvcCodec, Codec, JpegCodec
from megatron_codec.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.conversion import vocabulary
from megatron_codec.errors import UserError
from megatron_codec.model import build_model, transformer_config
from megatron_codec.preprocessing import PictureEncoder, iterate_streams
from megatron_codec.preprocessing.videos import VideoEncoder
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description

# Of the logits, as a share of the largest of them: what different orders of sums make of float32.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Side:
    """A folder of one kind, "hf" or "megatron"."""

    kind: str
    path: Path


def documents(
    inputs: Sequence[Path], samples: int, codec: Codec, tokenizer: Tokenizer
) -> list[tuple[bytes, list[int]]]:
    """Stream and ids, between BOS and EOS, of each picture or of the first clip of each video.

    Raises:
        UserError: none can be read, or the codec is of neither.
    """
    if isinstance(codec, AvcCodec):
        encoder = VideoEncoder(codec)
    elif isinstance(codec, JpegCodec):
        encoder = PictureEncoder(codec)
    else:
        raise UserError("--check", f"knows no files for the codec {codec.name}", "leave it out")
    streams = iterate_streams(inputs, encoder, limit=samples, progress=False)
    return [(s, [tokenizer.bos, *tokenizer.encode_to_list(s), tokenizer.eos]) for s in streams]


def check(
    sides: Sequence[Side],
    chosen: list[tuple[bytes, list[int]]],
    tokenizer: Tokenizer,
    context: int,
    dtype: torch.dtype,
) -> bool:
    """Prints how far the two sides agree on these documents, and what files they consist of.

    Args:
        chosen: `documents`.
        context: of the models, in tokens; a longer document is cut.

    Returns:
        Whether ids are equal and, in float32, logits within TOLERANCE of the largest.
    """
    good = _same_ids(sides, chosen, tokenizer)
    inputs = [ids[:context] for _, ids in chosen]
    found = [list(_LOGITS[side.kind](side.path, inputs, tokenizer.num_tokens, dtype)) for side in sides]
    largest = max(float(logits.abs().max()) for logits in found[0])
    apart = max(float((a - b).abs().max()) for a, b in zip(*found, strict=True))
    agree = sum(int((a.argmax(-1) == b.argmax(-1)).sum()) for a, b in zip(*found, strict=True))
    count = sum(map(len, inputs))
    name = str(dtype).removeprefix("torch.")
    print(
        f" logits of {count} tokens of {len(inputs)} documents, in {name}: largest difference {apart:.2e}, "
        f"largest logit {largest:.3g}; the likeliest token is the same after {agree} of {count}"
    )
    for side in sides:
        for file in sorted(filter(Path.is_file, side.path.rglob("*"))):
            print(f" {_digest(file)}  {file.stat().st_size:>14,}  {file}")
    return good and (dtype != torch.float32 or apart <= TOLERANCE * largest)


def _digest(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _same_ids(sides: Sequence[Side], chosen: list[tuple[bytes, list[int]]], tokenizer: Tokenizer) -> bool:
    good = True
    for side in sides:
        encode = vocabulary.library_encoder(side.path) if side.kind == "hf" else None
        if encode is None:
            continue
        differing = sum(encode(stream) != ids[1:-1] for stream, ids in chosen)
        good = good and not differing
        count = sum(len(ids) - 2 for _, ids in chosen)
        verdict = f"of {differing} DIFFERENT" if differing else "the same"
        print(f" {count} ids of {len(chosen)} documents in {side.path} by transformers: {verdict} as ours")
    return good


@torch.no_grad()
def _our_logits(path: Path, inputs: list[list[int]], num_tokens: int, dtype: torch.dtype) -> Iterator[Tensor]:
    model: ModelConfig = Description.read(path).model
    layout = parallel.initialize(ParallelConfig())
    training = TrainingConfig(bf16=dtype == torch.bfloat16)
    megatron = transformer_config(model, ParallelConfig(), training, layout)
    module = build_model(megatron, model, num_tokens, layout).to(layout.device).eval()
    checkpoint.load_weights(path, [module])
    for ids in inputs:
        tokens = torch.tensor([ids], device=layout.device)
        positions = torch.arange(len(ids), device=layout.device)[None]
        yield module(tokens, positions, attention_mask=None)[0, :, :num_tokens].float().cpu()


@torch.no_grad()
def _their_logits(
    path: Path, inputs: list[list[int]], num_tokens: int, dtype: torch.dtype
) -> Iterator[Tensor]:
    from transformers import AutoModelForCausalLM

    device = parallel.PLATFORM.device
    module: Any = AutoModelForCausalLM.from_pretrained(path, dtype=dtype)
    module = module.to(device).eval()
    for ids in inputs:
        yield module(torch.tensor([ids], device=device)).logits[0, :, :num_tokens].float().cpu()


_LOGITS = {"megatron": _our_logits, "hf": _their_logits}
