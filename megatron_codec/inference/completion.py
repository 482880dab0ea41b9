"""What `Engine.generate` makes of a prompt."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

from megatron_codec.codecs import Codec
from megatron_codec.inference.requests import Event
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class Completion:
    """One sample.

    Attributes:
        prompt_ids: the prompt as it was given, BOS included; of one that is healed, the ids that stay.
        token_ids: the new tokens, EOS included where the sample ended by itself; of a prompt that is healed
            they begin with those that spell its end.
        logprobs: natural log-probability of each new token under the model, before temperature and cuts.
        removed: of each new token, the probability that the grammar took away from what the settings kept; 0
            without a grammar.
        redrawn: how many of them the grammar put in place of what had come without it. A sample with none is
            the one that its seed gives without the grammar.
        finish_reason: `stop` at EOS, `length` at the limit.
        codec, tokenizer: what turns the ids into bytes and a picture.
        prompt_logprobs: where `Sampling.prompt_logprobs` asked for them, of each prompt token but the
            first; on the process that leads alone.
    """

    prompt_ids: list[int]
    token_ids: list[int]
    logprobs: list[float]
    removed: list[float]
    redrawn: int
    finish_reason: str
    codec: Codec
    tokenizer: Tokenizer
    prompt_logprobs: Sequence[float] = ()

    @cached_property
    def stream(self) -> bytes:
        """The bytes of prompt and continuation, without BOS and EOS."""
        special = (self.tokenizer.bos, self.tokenizer.eos, *self.tokenizer.prefix)
        return self.tokenizer.decode([i for i in self.prompt_ids + self.token_ids if i not in special])

    @cached_property
    def media(self):
        """The decoded picture or clip.

        Raises:
            DecodeError: the stream cannot be decoded.
        """
        return self.codec.decode(self.stream)


class Collector:
    """Gathers the events of one request: of each sample token ids, log-probabilities, what the grammar took
    away, what it put in place of others, finish reason."""

    def __init__(self, n: int, progress: Callable[[int], object]):
        self.samples: list[tuple[list[int], list[float], list[float], int, str]] = [
            ([], [], [], 0, "") for _ in range(n)
        ]
        self._progress = progress

    def __call__(self, events: Sequence[Event]) -> None:
        for event in events:
            ids, logprobs, removed, redrawn, _ = self.samples[event.sample]
            ids += event.token_ids
            logprobs += event.logprobs
            removed += event.removed
            reason = event.finish_reason or ""
            self.samples[event.sample] = ids, logprobs, removed, redrawn + event.redrawn, reason
            if reason:
                self._progress(1)
