"""A request to the engine and what comes back of it, token by token."""

import itertools
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from megatron_codec.inference.healing import Healing
from megatron_codec.inference.sampling import Sampling

_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class Event:
    """What one step of the engine added to one sample of a request.

    Attributes:
        sample: which of the request's `n`, from 0.
        token_ids: new tokens; none where the sample only ended.
        logprobs: natural log-probability of each under the model, before temperature and cuts.
        top_logprobs: of each, the `Sampling.logprobs` likeliest tokens with theirs.
        removed: of each, the probability that the grammar took away from what the settings kept.
        redrawn: how many of them the grammar put in place of what had come without it.
        finish_reason: `stop` at EOS or a stop token, `length` at the limit, `cancelled`, or `error`
            (`Request.error` says which); None while it goes on.
    """

    sample: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[dict[int, float], ...] = ()
    removed: tuple[float, ...] = ()
    redrawn: int = 0
    finish_reason: str | None = None


Deliver = Callable[[Sequence[Event]], object]


@dataclass(eq=False)
class Request:
    """A prompt on its way. Made by `Engine.submit`; one thread at a time may change it.

    Attributes:
        prompt: token ids; of a prompt that is healed, those that stay.
        cursor: where the grammar stands behind the prompt, or None.
        healing: how the samples spell the end of their prompt, or None where it is taken as it is.
        deliver: called after each step that concerns the request, on the engine's thread; must not block.
        cached_tokens: of the prompt, those whose keys were there already, known at the first event.
        prompt_logprobs: where `Sampling.prompt_logprobs` asks for them, one for each prompt token (None for
            the first, which nothing precedes), there at the first event.
        prompt_top_logprobs: the likeliest tokens in their places, as in `Event`.
        error: why it failed.
    """

    prompt: tuple[int, ...]
    sampling: Sampling
    deliver: Deliver
    cursor: Any = None
    healing: Healing | None = None
    number: int = field(default_factory=lambda: next(_numbers))
    cached_tokens: int = 0
    prompt_logprobs: list[float | None] = field(default_factory=list)
    prompt_top_logprobs: list[dict[int, float]] = field(default_factory=list)
    error: Exception | None = None
    finished: threading.Event = field(default_factory=threading.Event)

    def fail(self, error: Exception | BaseException) -> None:
        """Ends every sample with `error`."""
        self.error = error if isinstance(error, Exception) else RuntimeError(repr(error))
        events = [Event(sample, finish_reason="error") for sample in range(self.sampling.n)]
        self.finished.set()
        self.deliver(events)


@dataclass
class Statistics:
    """What an engine does now and has done so far.

    Attributes:
        waiting, running: requests.
        cache_used, cache_total: tokens in the key-value cache; kept prompts that nobody uses are not used.
        prompt_tokens, cached_tokens, generated_tokens: since the start; cached ones are among the prompts'.
        finished: samples by finish reason.
        constrained_tokens, removed, redrawn: generated under a grammar, the probability that it took away
            from each, summed, and how many it put in place of others.
        steps, step_seconds: forward passes, and how long they took together.
    """

    waiting: int = 0
    running: int = 0
    cache_used: int = 0
    cache_total: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    finished: dict[str, int] = field(default_factory=dict)
    constrained_tokens: int = 0
    removed: float = 0.0
    redrawn: int = 0
    steps: int = 0
    step_seconds: float = 0.0
