"""Sampling: temperature, then top-k, then top-p, with random numbers that depend on the request alone.

The order is the one of transformers and vLLM. The random number of a token is a function of the seed, the
prompt, the sample's number and the token's place, so a request gives the same tokens alone or in company.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_codec.errors import UserError, raise_all


@dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: keep the k likeliest tokens; 0 keeps all.
        top_p: of these, keep the likeliest that together reach this probability.
        min_p: of all, keep those with at least this share of the likeliest token's probability.
        seed: of the random numbers.
        n: samples a prompt.
        max_tokens: new tokens at most; None goes on to the end of the model's context.
        stop_token_ids: end a sample as EOS does; the token that ended it is part of it.
        ignore_eos: go on after EOS.
        logprobs: how many of the likeliest tokens to report beside each token.
        prompt_logprobs: report log-probabilities of the prompt's tokens too; `max_tokens` may then be 0.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    n: int = 1
    max_tokens: int | None = None
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int = 0
    prompt_logprobs: bool = False

    def __post_init__(self):
        raise_all(list(self._faults()))

    def _faults(self) -> Iterator[UserError]:
        if not 0 <= self.temperature < float("inf"):
            yield UserError(
                f"temperature {self.temperature}",
                "must be a finite number, 0 or more",
                "use 1.0, or 0 for greedy",
            )
        if self.top_k < 0:
            yield UserError(f"top_k {self.top_k}", "must be 0 (all tokens) or more", "use 0")
        if not 0 < self.top_p <= 1:
            yield UserError(
                f"top_p {self.top_p}", "must lie above 0 and not above 1", "use 1.0 for all tokens"
            )
        if not 0 <= self.min_p <= 1:
            yield UserError(f"min_p {self.min_p}", "must lie between 0 and 1", "use 0 for all tokens")
        if self.n < 1:
            yield UserError(f"n {self.n}", "must be at least 1", "use 1")
        least = 0 if self.prompt_logprobs else 1
        if self.max_tokens is not None and self.max_tokens < least:
            yield UserError(
                f"max_tokens {self.max_tokens}", f"must be at least {least}", "leave it out for no limit"
            )
        if self.logprobs < 0:
            yield UserError(f"logprobs {self.logprobs}", "must be at least 0", "use 0")

    def random_numbers(self, prompt: Sequence[int], sample: int, count: int) -> np.ndarray:
        """float64 [count] in [0, 1) for the tokens of one sample of one prompt, given by its ids."""
        identity = hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest()
        key = np.random.SeedSequence([self.seed & (2**64 - 1), int.from_bytes(identity, "little"), sample])
        return np.random.Generator(np.random.Philox(key)).random(count)


class RowSettings:
    """Sampling settings of some rows side by side, as tensors [b, 1]."""

    def __init__(self, settings: Sequence[Sampling], device: torch.device):
        def column(name: str, dtype: torch.dtype = torch.float64) -> Tensor:
            return torch.tensor([[getattr(s, name)] for s in settings], dtype=dtype, device=device)

        self.greedy = column("temperature") == 0
        self.all_greedy = all(s.temperature == 0 for s in settings)
        self.temperature = column("temperature").masked_fill(self.greedy, 1)
        self.top_k, self.top_p, self.min_p = column("top_k", torch.long), column("top_p"), column("min_p")
        self.has_top_k = any(s.top_k for s in settings)
        self.has_top_p = any(s.top_p < 1 for s in settings)
        self.has_min_p = any(s.min_p for s in settings)


def choose(logprobs: Tensor, settings: RowSettings, random: Tensor) -> Tensor:
    """Chooses a token for each row, int64 [b].

    Args:
        logprobs: natural, fp32 [b, v]; -inf where a token may not be chosen.
        random: float64 [b] in [0, 1).
    """
    greedy = logprobs.argmax(dim=-1)
    if settings.all_greedy:
        return greedy
    # float64, so that the last place of a sum over the vocabulary does not decide.
    probabilities = torch.softmax(logprobs.double() / settings.temperature, dim=-1)
    if settings.has_min_p:
        least = settings.min_p * probabilities.amax(dim=-1, keepdim=True)
        probabilities[probabilities < least] = 0
    if settings.has_top_k or settings.has_top_p:
        ordered, ids = probabilities.sort(dim=-1, descending=True, stable=True)
        places = torch.arange(ordered.shape[1], device=logprobs.device)
        ordered[(places >= settings.top_k) & (settings.top_k > 0)] = 0
        reached = ordered.cumsum(dim=-1)
        ordered[reached - ordered >= settings.top_p * reached[:, -1:]] = 0
        probabilities = torch.zeros_like(ordered).scatter_(1, ids, ordered)
    # In the order of the ids: of two tokens that are almost alike, rounding decides which comes first in the
    # order of likelihood, and so would decide which of them a random number means.
    reached = probabilities.cumsum(dim=-1)
    place = torch.searchsorted(reached, random[:, None] * reached[:, -1:], right=True)
    # Rounding may point behind the last token that was kept.
    numbers = torch.arange(probabilities.shape[1], device=logprobs.device)
    place = place.minimum((numbers * (probabilities > 0)).amax(dim=-1, keepdim=True))
    return torch.where(settings.greedy[:, 0], greedy, place[:, 0])
