"""Completions by a checkpoint of ours, and how well it predicts real pictures."""

import gc
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch

from megatron_codec.codecs import ImageCodec, get_codec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.completers import Progress, row_name
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.samples import Sample, stored_bytes
from megatron_codec.evaluation.upscaling import Upscaler, hash_folder
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.inference.admission import find_checkpoint


class Checkpoint:
    """A folder of checkpoints; its engine is made when it is first needed.

    Args:
        name: what the tables call it; by default its folder's.

    Raises:
        UserError: there is no checkpoint, or it is none of a codec of pictures.
    """

    def __init__(self, folder: Path, config: EngineConfig, name: str = ""):
        self.folder, self.config = folder, config
        self.name = name or folder.resolve().name
        self.path, self.description = find_checkpoint(folder, config)
        codec = get_codec(self.description.codec["name"], self.description.codec["settings"])
        if not hasattr(codec, "image_size"):
            raise UserError(
                f"--load {folder}",
                f"is a model of the codec '{codec.name}', and pictures are compared here",
                "give a checkpoint that writes pictures",
            )
        self.codec = cast(ImageCodec, codec)

    @cached_property
    def engine(self) -> Engine:
        """What computes."""
        return Engine.load(self.path, self.config)

    def release(self) -> None:
        """Gives the memory of the engine back."""
        self.__dict__.pop("engine", None)
        gc.collect()

    @cached_property
    def identity(self) -> dict[str, Any]:
        """SHA-256 of all its files, and what of the engine's settings changes tokens. Where it does not
        compute in fp32, batches and layouts round in other ways too; those are not asked."""
        engine = asdict(self.config)
        settings = {name: engine[name] for name in ("dtype", "weight_dtype", "canonical", "in_range")}
        settings["device"] = "cuda" if torch.cuda.is_available() else "cpu"
        return {"checkpoint_sha256": hash_folder(self.path), "engine": settings}


@dataclass(frozen=True)
class EngineCompleter:
    """A checkpoint with sampling settings, whose `seed` and `n` are of no account: a set has its own."""

    checkpoint: Checkpoint
    sampling: Sampling
    upscaler: Upscaler = field(default_factory=Upscaler)

    @property
    def name(self) -> str:
        """See `Completer`."""
        return row_name(f"model ({self.checkpoint.name})", self.sampling)

    @property
    def is_random(self) -> bool:
        """See `Completer`."""
        return self.sampling.temperature > 0 or self.upscaler.is_random

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """See `Completer`."""
        sampling = asdict(self.sampling)
        del sampling["seed"], sampling["n"]
        decides = self.checkpoint.identity | self.upscaler.identity
        return decides | {"sampling": sampling, "ratio": ratio, "seed": seed}

    def complete(
        self, originals: Originals, numbers: range, ratio: float, seed: int, progress: Progress
    ) -> list[Sample]:
        """See `Completer`. A prompt that does not fit into the model's context is all that there is of its
        picture, with the number `too_long`."""
        engine, codec = self.checkpoint.engine, self.checkpoint.codec
        streams = originals.streams(codec)
        # Random numbers are a function of seed, prompt and sample number: of originals with the same prompt,
        # which at ratio 0 all are, each is another sample of one request, and each part has another seed.
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        samples = {}
        for number in numbers:
            prompt = engine.prompt_ids(streams[number], ratio) if ratio > 0 else engine.prompt_ids()
            if len(prompt) < engine.config.seq_length:
                alike[tuple(prompt)].append(number)
                continue
            start, real = codec.prompt(streams[number], ratio), streams[number]
            made = Sample.of_stream(
                codec, start, real, originals.image_size, self.upscaler, (seed << 32) + number
            )
            known = {"new_tokens": 0, "redrawn_tokens": 0, "mean_removed": 0.0, "too_long": len(prompt)}
            samples[number] = replace(made, numbers=made.numbers | known)
            progress(1)
        part_seed = (seed << 32) + numbers.start
        settings = [replace(self.sampling, seed=part_seed, n=len(group)) for group in alike.values()]
        completions = engine.generate(list(alike), settings, progress)
        order = [number for group in alike.values() for number in group]
        for number, completion in zip(order, completions, strict=True):
            made = Sample.of_stream(
                codec,
                completion.stream,
                streams[number],
                originals.image_size,
                self.upscaler,
                (seed << 32) + number,
            )
            known = {
                "new_tokens": len(completion.token_ids),
                "redrawn_tokens": completion.redrawn,
                "mean_removed": sum(completion.removed) / max(1, len(completion.removed)),
            }
            samples[number] = replace(made, numbers=made.numbers | known)
        return [samples[number] for number in numbers]

    def release(self) -> None:
        """See `Completer`."""
        self.checkpoint.release()
        self.upscaler.release()


def held_out(checkpoint: Checkpoint, originals: Originals, progress: Progress) -> dict[str, Any]:
    """How well the model predicts the codec's streams of real pictures, each by itself from its BOS.

    Returns:
        nats a token (EOS too, BOS not), bits a byte of the streams and a pixel; how many pictures these are
        over, and how many were left out because they are longer than the model's context. The engine gives
        no probability to what never comes (BOS, padding of the embedding), so a model that has hardly been
        trained has a little less here than its validation loss.
    """
    engine = checkpoint.engine
    tokenizer, context = engine.tokenizer, engine.config.seq_length
    prompts, num_bytes = [], 0.0
    for stream in originals.streams(checkpoint.codec):
        prompt = [tokenizer.bos, *tokenizer.encode(stream).tolist(), tokenizer.eos]
        if len(prompt) <= context:
            prompts.append(prompt)
            num_bytes += stored_bytes(checkpoint.codec, len(stream))
        else:
            progress(1)
    scored = engine.generate(prompts, Sampling(max_tokens=0, prompt_logprobs=True, constrain=False), progress)
    nats = -sum(sum(completion.prompt_logprobs) for completion in scored)
    tokens = sum(len(completion.prompt_logprobs) for completion in scored)
    pixels = len(prompts) * checkpoint.codec.image_size**2
    return {
        "nats_per_token": nats / tokens if tokens else None,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "bits_per_pixel": nats / math.log(2) / pixels if pixels else None,
        "tokens": tokens,
        "pictures": len(prompts),
        "longer_than_the_context": len(originals) - len(prompts),
    }
