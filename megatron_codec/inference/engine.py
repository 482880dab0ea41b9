"""The engine: prompts in, tokens, byte streams and pictures out.

A step computes a token of every running sample and a part of the prompts that are new; between two steps
requests come and go. `step` is the place to start reading.

With TP or PP one process leads: it schedules and samples, and tells the others each step (`follow`).
"""

import logging
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_codec import parallel
from megatron_codec.codecs import Codec, get_codec
from megatron_codec.config import ModelConfig, TrainingConfig
from megatron_codec.inference.admission import check_request, find_checkpoint
from megatron_codec.inference.blocks import BLOCK
from megatron_codec.inference.completion import Collector, Completion
from megatron_codec.inference.config import EngineConfig, cache_blocks
from megatron_codec.inference.decoder import Decoder
from megatron_codec.inference.drawing import Drawing
from megatron_codec.inference.healing import heal
from megatron_codec.inference.requests import Deliver, Event, Request, Statistics
from megatron_codec.inference.sampling import Sampling
from megatron_codec.inference.scheduler import Sample, Scheduler
from megatron_codec.inference.step import Step
from megatron_codec.model import build_model, transformer_config
from megatron_codec.model.products import needs_copies
from megatron_codec.parallel import Layout
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training import checkpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Memory:
    """Bytes of one process: of its weights, and of its part of the key-value cache when that is full."""

    weights: int
    cache: int

    def __str__(self) -> str:
        return f"weights {self.weights / 2**30:.2f} GiB, key-value cache up to {self.cache / 2**30:.2f} GiB"


@dataclass(frozen=True)
class _Results:
    """What `generate` has made, for the processes that follow."""

    samples: Any


@dataclass(frozen=True)
class _End:
    """No more steps; `fault` where the leading process failed."""

    fault: str = ""


class Engine:
    """A model ready to generate. Make it with `Engine.load`.

    Args:
        frees: see `Decoder`.

    One thread at a time may use it, but for `request`, which any thread may call.
    """

    def __init__(
        self,
        model: GPTModel,
        model_config: ModelConfig,
        tokenizer: Tokenizer,
        codec: Codec,
        layout: Layout,
        config: EngineConfig | None = None,
        frees: bool = False,
    ):
        self.config, self.layout = model_config, layout
        self.tokenizer, self.codec = tokenizer, codec
        config = config or EngineConfig()
        blocks = cache_blocks(config, model.config, model_config, layout)
        base, context = model_config.rotary_base, model_config.seq_length
        int8 = config.weight_dtype == "int8"
        matrices = [p.numel() for name, p in model.named_parameters() if ".linear_" in name and p.dim() == 2]
        numbers = sum(p.numel() for p in model.parameters())
        size = model.config.params_dtype.itemsize
        kept = 1 if int8 else torch.float32.itemsize if needs_copies(next(model.parameters())) else size
        graph_rows = config.max_batch_size if config.cuda_graphs else 0
        self.decoder = Decoder(model, layout, blocks, base, context, int8, graph_rows, frees)
        self.memory = Memory(
            weights=numbers * size + sum(matrices) * (kept - size),
            cache=blocks * self.decoder.bytes_per_block(),
        )
        self.scheduler = Scheduler(blocks, config.max_batch_size, config.prefill_chunk_size)
        self.drawing = Drawing(codec, tokenizer, model_config.padded_vocab_size(tokenizer.num_tokens), config)
        self._cache_tokens = blocks * BLOCK
        self._totals = Statistics(cache_total=self._cache_tokens)
        self._finished: dict[str, int] = {}
        self._events: dict[Request, list[Event]] = {}
        self._ranks = torch.distributed.get_process_group_ranks(layout.groups.mp)

    @classmethod
    def load(cls, folder: str | Path, config: EngineConfig | None = None) -> "Engine":
        """Reads a checkpoint folder, which is enough by itself, under any layout.

        Args:
            folder: what `--save` of training was, or one `iter_...` folder in it.

        Raises:
            UserError: there is no checkpoint, it is damaged, the layout does not fit its shape, or there is
                no memory for a cache.
        """
        config = config or EngineConfig()
        start, description = find_checkpoint(folder, config)
        tokenizer = Tokenizer.from_dict(description.tokenizer)
        codec = get_codec(description.codec["name"], description.codec["settings"])
        layout = parallel.initialize(config.parallel)
        dtype = config.dtype or ("bfloat16" if description.bf16 else "float32")
        megatron = transformer_config(
            description.model, config.parallel, TrainingConfig(bf16=dtype == "bfloat16"), layout
        )
        model = build_model(megatron, description.model, tokenizer.num_tokens, layout).to(layout.device)
        checkpoint.load_weights(start, [model])
        return cls(model, description.model, tokenizer, codec, layout, config, frees=True)

    @property
    def leads(self) -> bool:
        """Whether this process schedules and samples; the others `follow`."""
        return torch.distributed.get_rank() == self._ranks[0]

    @property
    def busy(self) -> bool:
        """Whether there is anything to compute."""
        return self.scheduler.busy

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling | Sequence[Sampling] | None = None,
        progress: Callable[[int], object] = lambda count: None,
    ) -> list[Completion]:
        """Continues every prompt `sampling.n` times.

        Every process of a TP x PP layout calls it with the same arguments and gets the same results.

        Args:
            prompts: token ids, BOS first (`prompt_ids` makes them).
            sampling: one for all prompts, or one for each.
            progress: called with the number of samples just finished.

        Returns:
            All samples of the first prompt, then all of the second, and so on.

        Raises:
            UserError: a prompt is empty, has ids that the model does not know, or does not fit.
        """
        if not isinstance(sampling, Sequence):
            sampling = [sampling or Sampling()] * len(prompts)
        collected = [Collector(settings.n, progress) for settings in sampling]
        requests = [
            self.request(prompt, settings, collector, f"prompt {number}")
            for number, (prompt, settings, collector) in enumerate(
                zip(prompts, sampling, collected, strict=True)
            )
        ]
        if self.leads:
            try:
                for request in requests:
                    self.add(request)
                while self.busy:
                    self.step()
            except BaseException as error:
                self.close(f"{type(error).__name__}: {error}")
                raise
            samples = [collector.samples for collector in collected]
            self._tell(_Results(samples))
        else:
            results = self.follow()
            if results is None:
                raise RuntimeError("the leading process ended before it had results")
            samples = results.samples
        return [
            Completion(
                prompt_ids=list(request.prompt),
                token_ids=ids,
                logprobs=logprobs,
                removed=removed,
                redrawn=redrawn,
                finish_reason=reason,
                codec=self.codec,
                tokenizer=self.tokenizer,
                prompt_logprobs=[value for value in request.prompt_logprobs if value is not None],
            )
            for request, of_request in zip(requests, samples, strict=True)
            for ids, logprobs, removed, redrawn, reason in of_request
        ]

    def prompt_ids(self, stream: bytes | None = None, ratio: float = 0.0) -> list[int]:
        """The prompt for the first part of a stream, or, without one, for a picture made from nothing.

        The ids are those of this part by itself. In the whole stream its last bytes may belong to a longer
        token: sample with `Sampling.heal_prompt`.

        Args:
            stream: what `codec.encode` made of a picture or clip.
            ratio: share of it to keep, in patches; `Codec.prompt` says how it is cut.
        """
        start = self.codec.preamble if stream is None else self.codec.prompt(stream, ratio)
        return [self.tokenizer.bos, *self.tokenizer.encode(start).tolist()]

    def request(
        self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver, name: str = "prompt"
    ) -> Request:
        """A request for `add`, when it can be served at all.

        Raises:
            UserError: the prompt is empty, has ids that the model does not know, does not fit, or is no
                beginning of a valid stream where the samples have to be valid.
        """
        room = {"the model's context": self.config.seq_length, "the key-value cache": self._cache_tokens}
        check_request(prompt, sampling, self.tokenizer.num_tokens, room, name)
        if sampling.max_tokens == 0:
            return Request(tuple(int(i) for i in prompt), sampling, deliver)
        masks = self.drawing.masks if sampling.constrained else None
        if sampling.heal_prompt:
            most = min(room.values())
            healing = heal(prompt, self.tokenizer, masks, sampling.max_tokens, most, name)
            if healing is not None:
                return Request(healing.certain, sampling, deliver, healing.cursor, healing)
        cursor = None if masks is None else masks.begin(prompt, name)
        return Request(tuple(int(i) for i in prompt), sampling, deliver, cursor)

    def add(self, request: Request) -> None:
        """Takes a request in; its events come with the steps."""
        sampling, prompt = request.sampling, request.prompt
        room = min(self.config.seq_length, self._cache_tokens) - len(prompt)
        limit = room if sampling.max_tokens is None else sampling.max_tokens
        given, count = prompt, limit
        if request.healing is not None:
            given, count = request.healing.given, min(room, limit + request.healing.most)
        if sampling.prompt_logprobs:
            request.prompt_logprobs = [None] * len(prompt)
            request.prompt_top_logprobs = [{} for _ in prompt]
        samples = [
            Sample(request, number, list(prompt), limit, sampling.random_numbers(given, number, count))
            for number in range(sampling.n)
        ]
        if request.cursor is not None:
            for sample in samples:
                sample.cursor = request.cursor.copy()
        self.scheduler.add(request, samples)
        self._totals.prompt_tokens += len(prompt)

    def cancel(self, request: Request, samples: Collection[int] | None = None) -> None:
        """Ends what is left of a request, or those of its samples; they have the tokens that they have."""
        if request.number in self.scheduler.open:
            for number, sample in list(self.scheduler.open[request.number].going.items()):
                if samples is None or number in samples:
                    self._end(sample, Event(number, finish_reason="cancelled"))
            self._deliver()

    def step(self) -> None:
        """Lets requests join, computes the next token of every sample that runs, and delivers events.

        With nothing to compute it is a sign of life for the processes that follow.
        """
        started = time.perf_counter()
        forks = self.scheduler.join()
        if forks:
            self._sample([sample for sample, _ in forks], torch.stack([logits for _, logits in forks]))
        step = self.scheduler.plan()
        self._tell(step)
        if step is not None:
            logits = self.decoder.forward(step)
            assert logits is not None
            self.scheduler.computed()
            self._take(logits.cpu())
            self._totals.steps += 1
            self._totals.step_seconds += time.perf_counter() - started
        self._deliver()

    def follow(self) -> _Results | None:
        """Computes the steps that the leading process tells, until it has results or ends.

        Raises:
            RuntimeError: the leading process failed.
        """
        while True:
            told: list[Any] = [None]
            torch.distributed.broadcast_object_list(
                told, self._ranks[0], self.layout.groups.mp, self.layout.device
            )
            message = told[0]
            if isinstance(message, Step):
                self.decoder.forward(message)
            elif isinstance(message, _Results):
                return message
            elif isinstance(message, _End):
                if message.fault:
                    raise RuntimeError(f"the leading process failed: {message.fault}")
                return None

    def close(self, fault: str = "") -> None:
        """Ends the processes that follow."""
        self._tell(_End(fault))

    def statistics(self) -> Statistics:
        """What it does now and has done so far."""
        running = {sample.request for sample in self.scheduler.running}
        return replace(
            self._totals,
            waiting=len(self.scheduler.open) - len(running),
            running=len(running),
            cache_used=self.scheduler.pool.used * BLOCK,
            finished=dict(self._finished),
        )

    def _tell(self, message: Step | _Results | _End | None) -> None:
        if len(self._ranks) > 1:
            torch.distributed.broadcast_object_list(
                [message], self._ranks[0], self.layout.groups.mp, self.layout.device
            )

    def _take(self, logits: Tensor) -> None:
        """Samples from the logits of the step that was just computed."""
        samples, rows, row = [], [], 0
        for part in self.scheduler.parts:
            if part.scores_prompt:
                count = part.stop - part.start
                self.drawing.score_prompt(part, logits[row : row + count])
                row += count
            elif part.samples:
                row += 1
            if part.samples:
                samples.append(part.sample)
                rows.append(row - 1)
                if part.sample.new_tokens == 0:
                    self.scheduler.hold_prompt(part.sample, logits[row - 1])
                    if part.sample.number == 0:
                        self._totals.cached_tokens += part.sample.request.cached_tokens
        if samples:
            self._sample(samples, logits if len(rows) == len(logits) else logits[rows])

    def _sample(self, samples: list[Sample], logits: Tensor) -> None:
        """Adds a token to each sample, from its row of logits [b, v]."""
        ended = [sample for sample in samples if sample.limit == 0]
        for sample in ended:
            self._end(sample, Event(sample.number, finish_reason="length"))
        if ended:
            kept = [i for i, sample in enumerate(samples) if sample.limit]
            samples, logits = [samples[i] for i in kept], logits[kept]
        if not samples:
            return
        for sample, drawn in zip(samples, self.drawing.draw(samples, logits), strict=True):
            sample.tokens.append(drawn.token)
            if sample.cursor is not None:
                self.drawing.masks.read(sample.cursor, drawn.token)
                self._totals.constrained_tokens += 1
                self._totals.removed += drawn.removed
                self._totals.redrawn += drawn.redrawn
            reason = self._reason(sample, drawn.token)
            event = Event(
                sample.number,
                (drawn.token,),
                (drawn.logprob,),
                (drawn.top,) if drawn.top else (),
                (drawn.removed,),
                int(drawn.redrawn),
                reason,
            )
            if reason:
                self._end(sample, event)
            else:
                self._events.setdefault(sample.request, []).append(event)
        self._totals.generated_tokens += len(samples)

    def _reason(self, sample: Sample, token: int) -> str | None:
        """Why a sample ends with the token that it has just got, or None."""
        sampling = sample.request.sampling
        if sample.repeats:  # what was given counts for nothing
            sample.limit = min(sample.limit + 1, len(sample.random))
        elif token in sampling.stop_token_ids or (token == self.tokenizer.eos and not sampling.ignore_eos):
            return "stop"
        return "length" if sample.new_tokens == sample.limit else None

    def _end(self, sample: Sample, event: Event) -> None:
        assert event.finish_reason is not None
        self._finished[event.finish_reason] = self._finished.get(event.finish_reason, 0) + 1
        self._events.setdefault(sample.request, []).append(event)
        self.scheduler.remove(sample)

    def _deliver(self) -> None:
        events, self._events = self._events, {}
        for request, of_request in events.items():
            try:
                request.deliver(of_request)
            except Exception:  # of one receiver, and no matter of the others
                logger.exception("request %d: its events could not be delivered", request.number)
                self.cancel(request)
            if request.number not in self.scheduler.open:
                request.finished.set()
