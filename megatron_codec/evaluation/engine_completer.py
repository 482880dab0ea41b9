"""Completions by a checkpoint of ours, and how well it predicts real pictures."""

import hashlib
import math
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from megatron_codec.codecs import DecodeError, ImageCodec, get_codec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.completers import Progress, Sample
from megatron_codec.evaluation.originals import Originals
from megatron_codec.inference import Completion, Engine, EngineConfig, Sampling
from megatron_codec.inference.admission import find_checkpoint


class Checkpoint:
    """A folder of checkpoints; its engine is made when it is first needed.

    Raises:
        UserError: there is no checkpoint, or it is none of a codec of pictures.
    """

    def __init__(self, folder: Path, config: EngineConfig):
        self.folder, self.config = folder, config
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

    @cached_property
    def identity(self) -> dict[str, Any]:
        """SHA-256 of all its files, and what of the engine's settings changes tokens."""
        digest = hashlib.sha256()
        for file in sorted(path for path in self.path.rglob("*") if path.is_file()):
            digest.update(f"{file.relative_to(self.path)} {_hash_file(file)}\n".encode())
        engine = asdict(self.config)
        settings = {name: engine[name] for name in ("dtype", "weight_dtype", "canonical", "in_range")}
        return {"checkpoint_sha256": digest.hexdigest(), "engine": settings}


@dataclass(frozen=True)
class EngineCompleter:
    """A checkpoint with sampling settings, whose `seed` and `n` are of no account: a set has its own."""

    checkpoint: Checkpoint
    sampling: Sampling

    @property
    def name(self) -> str:
        """See `Completer`."""
        cuts = [f"top-k {self.sampling.top_k}"] if self.sampling.top_k else []
        cuts += [f"top-p {self.sampling.top_p:g}"] if self.sampling.top_p < 1 else []
        cuts += [f"temperature {self.sampling.temperature:g}"] if self.sampling.temperature != 1 else []
        cuts += [] if self.sampling.constrained else ["no grammar"]
        return ", ".join([f"model ({self.checkpoint.folder.resolve().name})", *cuts])

    @property
    def is_random(self) -> bool:
        """See `Completer`."""
        return self.sampling.temperature > 0

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """See `Completer`."""
        sampling = asdict(self.sampling)
        del sampling["seed"], sampling["n"]
        return self.checkpoint.identity | {"sampling": sampling, "ratio": ratio, "seed": seed}

    def complete(self, originals: Originals, ratio: float, seed: int, progress: Progress) -> list[Sample]:
        """See `Completer`."""
        engine = self.checkpoint.engine
        # Random numbers are a function of prompt and sample number: of originals with the same prompt, which
        # at ratio 0 all are, each is another sample of one request.
        alike: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, stream in enumerate(originals.streams):
            prompt = engine.prompt_ids(stream, ratio) if ratio > 0 else engine.prompt_ids()
            alike[tuple(prompt)].append(number)
        settings = [replace(self.sampling, seed=seed, n=len(numbers)) for numbers in alike.values()]
        completions = engine.generate(list(alike), settings, progress)
        samples: list[Sample | None] = [None] * len(originals)
        order = [number for numbers in alike.values() for number in numbers]
        for number, completion in zip(order, completions, strict=True):
            samples[number] = _sample(completion, engine)
        return cast(list[Sample], samples)


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
    prompts, num_bytes = [], 0
    for stream in originals.streams:
        prompt = [tokenizer.bos, *tokenizer.encode(stream).tolist(), tokenizer.eos]
        if len(prompt) < context:
            prompts.append(prompt)
            num_bytes += len(stream)
        else:
            progress(1)
    scored = engine.generate(prompts, Sampling(max_tokens=0, prompt_logprobs=True, constrain=False), progress)
    nats = -sum(sum(completion.prompt_logprobs) for completion in scored)
    tokens = sum(len(completion.prompt_logprobs) for completion in scored)
    pixels = len(prompts) * originals.codec.image_size**2
    return {
        "nats_per_token": nats / tokens if tokens else None,
        "bits_per_byte": nats / math.log(2) / num_bytes if num_bytes else None,
        "bits_per_pixel": nats / math.log(2) / pixels if pixels else None,
        "tokens": tokens,
        "pictures": len(prompts),
        "longer_than_the_context": len(originals) - len(prompts),
    }


def _sample(completion: Completion, engine: Engine) -> Sample:
    codec, stream = engine.codec, completion.stream
    try:
        _ = completion.media
        content, suffix, decodes = codec.to_file(stream), codec.file_suffix, True
    except DecodeError:
        content, suffix, decodes = stream, ".broken", False
    numbers = {
        "bytes": len(stream),
        "valid": codec.check(stream).valid,
        "decodes": decodes,
        "new_tokens": len(completion.token_ids),
        "redrawn_tokens": completion.redrawn,
        "mean_removed": sum(completion.removed) / max(1, len(completion.removed)),
    }
    return Sample(content, suffix, numbers)


def _hash_file(file: Path) -> str:
    digest = hashlib.sha256()
    with open(file, "rb") as stream:
        while part := stream.read(2**24):
            digest.update(part)
    return digest.hexdigest()
