"""The engine: prompts in, tokens, byte streams and pictures out.

Every process of a TP x PP layout calls `generate` with the same arguments and gets the same results;
random numbers are drawn alike everywhere, so nothing but hidden states and logits is exchanged.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_codec import parallel
from megatron_codec.codecs import Codec, get_codec
from megatron_codec.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.inference.cache import CachedAttention, KeyValueCache, attach
from megatron_codec.inference.sampling import Sampling, choose
from megatron_codec.model import build_model, transformer_config
from megatron_codec.parallel import Layout
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description


def find_checkpoint(folder: str | Path, config: ParallelConfig) -> tuple[Path, Description]:
    """The newest checkpoint in a folder and what it says of itself.

    Raises:
        UserError: there is none, or the layout does not fit its shape or the number of processes.
    """
    start = checkpoint.latest(folder)
    description = Description.read(start)
    world_size = parallel.world_size_from_environment()
    faults = [*config.faults(world_size), *description.model.faults(config)]
    processes = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    if processes > 0 and world_size > processes:
        faults.append(
            UserError(
                f"{world_size} processes",
                f"generation needs TP x PP = {processes}: every process works on the same samples",
                f"start {processes} (torchrun --nproc-per-node), or change the layout",
            )
        )
    raise_all(faults)
    return start, description


@dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
        prompt_ids: the prompt as it was given, BOS included.
        token_ids: the new tokens, EOS included where the sample ended by itself.
        logprobs: natural log-probability of each new token under the model, before temperature and cuts.
        finish_reason: `stop` at EOS, `length` at the limit.
        codec, tokenizer: what turns the ids into bytes and a picture.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str
    codec: Codec
    tokenizer: Tokenizer

    @cached_property
    def stream(self) -> bytes:
        """The bytes of prompt and continuation, without BOS and EOS."""
        special = (self.tokenizer.bos, self.tokenizer.eos)
        return self.tokenizer.decode([i for i in self.prompt_ids + self.token_ids if i not in special])

    @cached_property
    def media(self):
        """The decoded picture or clip.

        Raises:
            DecodeError: the stream cannot be decoded.
        """
        return self.codec.decode(self.stream)


class Engine:
    """A model ready to generate. Make it with `Engine.load`."""

    def __init__(
        self, model: GPTModel, config: ModelConfig, tokenizer: Tokenizer, codec: Codec, layout: Layout
    ):
        self.model, self.config, self.layout = model.eval(), config, layout
        self.tokenizer, self.codec = tokenizer, codec
        # Padding of the embedding and BOS are never chosen.
        self.forbidden = torch.zeros(config.padded_vocab_size(tokenizer.num_tokens), device=layout.device)
        self.forbidden[tokenizer.num_tokens :] = -torch.inf
        self.forbidden[tokenizer.bos] = -torch.inf

    @classmethod
    def load(
        cls, folder: str | Path, config: ParallelConfig | None = None, dtype: str | None = None
    ) -> "Engine":
        """Reads a checkpoint folder, which is enough by itself, under any layout.

        Args:
            folder: what `--save` of training was, or one `iter_...` folder in it.
            config: TP and PP of this engine; one process by default.
            dtype: `float32` or `bfloat16`; by default what it was trained in.

        Raises:
            UserError: there is no checkpoint, it is damaged, or the layout does not fit its shape.
        """
        config = config or ParallelConfig()
        start, description = find_checkpoint(folder, config)
        tokenizer = Tokenizer.from_dict(description.tokenizer)
        codec = get_codec(description.codec["name"], description.codec["settings"])
        layout = parallel.initialize(config)
        dtype = dtype or ("bfloat16" if description.bf16 else "float32")
        megatron = transformer_config(
            description.model, config, TrainingConfig(bf16=dtype == "bfloat16"), layout
        )
        model = build_model(
            megatron, description.model, tokenizer.num_tokens, layout, core_attention=CachedAttention
        ).to(layout.device)
        checkpoint.load_weights(start, [model])
        return cls(model, description.model, tokenizer, codec, layout)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | None = None,
        batch_size: int = 64,
        prefill_chunk: int = 512,
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[Completion]:
        """Continues every prompt `sampling.n` times.

        Args:
            prompts: token ids, BOS first (`prompt_ids` makes them).
            batch_size: sequences that are decoded together.
            prefill_chunk: prompt tokens that are computed at once.
            progress: called with the number of sequences just finished.

        Returns:
            All samples of the first prompt, then all of the second, and so on.

        Raises:
            UserError: a prompt is empty, has ids that the model does not know, or fills the context.
        """
        sampling = sampling or Sampling()
        for number, prompt in enumerate(prompts):
            self._check_prompt(number, prompt)
        results: list[Completion] = []
        samples = [(p, s) for p in range(len(prompts)) for s in range(sampling.n)]
        for start in range(0, len(samples), batch_size):
            batch = samples[start : start + batch_size]
            results += self._generate_batch(prompts, batch, sampling, prefill_chunk, progress)
        return results

    def prompt_ids(self, stream: bytes | None = None, ratio: float = 0.0) -> list[int]:
        """The prompt for the first part of a stream, or, without one, for a picture made from nothing.

        Args:
            stream: what `codec.encode` made of a picture or clip.
            ratio: share of it to keep, in patches; `Codec.prompt` says how it is cut.
        """
        start = self.codec.preamble if stream is None else self.codec.prompt(stream, ratio)
        return [self.tokenizer.bos, *self.tokenizer.encode(start).tolist()]

    def _check_prompt(self, number: int, prompt: Sequence[int]) -> None:
        unknown = [i for i in prompt if not 0 <= i < self.tokenizer.num_tokens]
        if unknown:
            raise UserError(
                f"prompt {number}: token id {unknown[0]}",
                f"must be an id from 0 to {self.tokenizer.num_tokens - 1}",
                "encode the prompt with the tokenizer of the checkpoint",
            )
        if not 0 < len(prompt) < self.config.seq_length:
            raise UserError(
                f"prompt {number} of {len(prompt)} tokens",
                f"must have at least 1 token and fewer than the model's context of {self.config.seq_length}",
                "start with BOS; use a smaller ratio",
            )

    def _generate_batch(
        self, prompts, samples: list[tuple[int, int]], sampling: Sampling, prefill_chunk: int, progress
    ) -> list[Completion]:
        """Continues `samples`, pairs of a prompt's number and a sample's number, together."""
        device, context = self.layout.device, self.config.seq_length
        numbers = sorted({prompt for prompt, _ in samples})
        lengths = torch.tensor([len(prompts[p]) for p in numbers], device=device)
        limits = [min(sampling.max_tokens or context, context - len(prompts[p])) for p, _ in samples]
        longest = max(len(prompts[p]) + most for (p, _), most in zip(samples, limits, strict=True))
        cache = KeyValueCache(
            self.model.config, len(self.model.decoder.layers), len(numbers), longest, device
        )
        attach(self.model, cache)
        logits = self._prefill([prompts[p] for p in numbers], lengths, cache, prefill_chunk)

        # Each prompt was computed once; its samples go on from copies of its cache.
        source = torch.tensor([numbers.index(p) for p, _ in samples], device=device)
        cache.select(source, int(lengths.max()))
        logits, positions = logits[source], lengths[source]
        random = np.stack([sampling.random_numbers(prompts[p], s, max(limits)) for p, s in samples])
        random = torch.from_numpy(random).to(device)

        tokens_of: list[list[int]] = [[] for _ in samples]
        logprobs_of: list[list[float]] = [[] for _ in samples]
        rows = list(range(len(samples)))  # which sample each row of the cache belongs to
        going = set(rows)
        for step in range(max(limits)):
            tokens, logprobs = choose(logits + self.forbidden, sampling, random[rows, step])
            for sample, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist(), strict=True):
                if sample in going:
                    tokens_of[sample].append(token)
                    logprobs_of[sample].append(logprob)
                    if token == self.tokenizer.eos or step + 1 == limits[sample]:
                        going.remove(sample)
                        progress(1)
            if not going:
                break
            # Dropping a finished row copies the cache of the others, so wait until it is worth it. Until
            # then it is computed along, at a place where nobody looks.
            if len(going) <= 0.75 * len(rows):
                kept = torch.tensor(
                    [row for row, sample in enumerate(rows) if sample in going], device=device
                )
                cache.select(kept, int(positions.max()))
                tokens, positions = tokens[kept], positions[kept]
                rows = [sample for sample in rows if sample in going]
            logits = self._forward(tokens[:, None], positions[:, None], cache)[:, -1]
            positions = (positions + 1).clamp(max=longest - 1)

        return [
            Completion(
                prompt_ids=list(prompts[p]),
                token_ids=ids,
                logprobs=values,
                finish_reason="stop" if ids[-1] == self.tokenizer.eos else "length",
                codec=self.codec,
                tokenizer=self.tokenizer,
            )
            for (p, _), ids, values in zip(samples, tokens_of, logprobs_of, strict=True)
        ]

    def _prefill(self, prompts, lengths: Tensor, cache: KeyValueCache, chunk: int) -> Tensor:
        """Computes all prompts in chunks; returns the logits after the last token of each, [b, v]."""
        width = int(lengths.max())
        padded = torch.zeros((len(prompts), width), dtype=torch.long, device=self.layout.device)
        for row, prompt in enumerate(prompts):
            padded[row, : len(prompt)] = torch.tensor(prompt)
        last = torch.empty((len(prompts), len(self.forbidden)), device=self.layout.device)
        for start in range(0, width, chunk):
            tokens = padded[:, start : start + chunk]
            positions = torch.arange(start, start + tokens.shape[1], device=self.layout.device).expand_as(
                tokens
            )
            logits = self._forward(tokens, positions, cache)
            ends = (lengths - 1 >= start) & (lengths - 1 < start + tokens.shape[1])
            last[ends] = logits[ends, (lengths - 1 - start)[ends]].float()
        return last

    def _forward(self, tokens: Tensor, positions: Tensor, cache: KeyValueCache) -> Tensor:
        """Logits of every token, [b, s, v], on every process."""
        cache.advance(positions)
        layout = self.layout
        shape = (tokens.shape[1], tokens.shape[0], self.config.hidden_size)
        ranks = torch.distributed.get_process_group_ranks(layout.groups.pp)
        if not layout.has_embedding():
            hidden = torch.empty(shape, dtype=self.model.config.params_dtype, device=layout.device)
            torch.distributed.recv(hidden, ranks[layout.pp_rank - 1])
            self.model.set_input_tensor(hidden)
        output = self.model(tokens, positions, attention_mask=None, runtime_gather_output=True)
        if layout.pp == 1:
            return output.float()
        if not layout.has_output():
            torch.distributed.send(output.contiguous(), ranks[layout.pp_rank + 1])
            output = torch.empty((*tokens.shape, len(self.forbidden)), device=layout.device)
        output = output.float()
        torch.distributed.broadcast(output, ranks[-1], group=layout.groups.pp)
        return output
