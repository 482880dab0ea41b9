"""Sampling: temperature, then top-k, then top-p, with random numbers that depend on the request alone.

The order is the one of transformers and vLLM. The random number of a token is a function of the seed, the
prompt, the sample's number and the token's place, so a request gives the same tokens alone or in company.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

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
        constrain: let only tokens follow that can become a whole, valid file of the codec, within
            `max_tokens` where that is enough for one. None does so unless `ignore_eos` is set.
        heal_prompt: the prompt is the first part of a stream, cut anywhere: draw its last tokens again, so
            that they can be longer and spell what follows too (inference/healing.py). The new tokens then
            begin with them; `max_tokens` and `stop_token_ids` leave out those that only repeat the prompt.
            Otherwise, and for ids that are not the tokenizer's for any stream, prompts are taken as they are.
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
    constrain: bool | None = None
    heal_prompt: bool = False

    def __post_init__(self):
        raise_all(list(self._faults()))

    @property
    def constrained(self) -> bool:
        """Whether tokens are held to the codec's grammar."""
        return not self.ignore_eos if self.constrain is None else self.constrain

    def _faults(self) -> Iterator[UserError]:
        if self.constrain and self.ignore_eos:
            yield UserError(
                "constrain with ignore_eos", "nothing can follow the end of a file", "leave one of them out"
            )
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
        """float64 [count, 2] in [0, 1) for the tokens of one sample of one prompt, given by its ids: for each
        token, and for drawing it again where a grammar refuses it."""
        identity = hashlib.sha256(np.asarray(prompt, np.int64).tobytes()).digest()
        key = [self.seed & (2**64 - 1), int.from_bytes(identity, "little"), sample]
        # Of each the first ones, however many there are.
        sources = (np.random.Philox(np.random.SeedSequence(words)) for words in (key, [*key, 1]))
        return np.stack([np.random.Generator(source).random(count) for source in sources], 1)


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


class Chosen(NamedTuple):
    """What `choose` chose, a token for each row.

    Attributes:
        tokens: ids, int64 [b].
        removed: the probability that the mask took away, float64 [b]; None without a mask.
        redrawn: whether the token that had come without the mask was refused by it, bool [b]; or None.
    """

    tokens: Tensor
    removed: Tensor | None = None
    redrawn: Tensor | None = None


def choose(logprobs: Tensor, settings: RowSettings, random: Tensor, allowed: Tensor | None = None) -> Chosen:
    """Chooses a token for each row.

    With a mask, the token that comes without it is kept where it is allowed; else one is drawn again among
    the allowed ones of those that the settings keep. So a token has the probability that it has without the
    mask, given that an allowed one comes; and a sample of which nothing was drawn again is the one that its
    seed gives without the mask. Where the settings keep no allowed token, they are applied to the allowed
    ones.

    Args:
        logprobs: natural, fp32 [b, v]; -inf where a token may not be chosen.
        random: float64 [b, 2] in [0, 1): for the token, and for drawing it again.
        allowed: bool [b, v], at least one in each row.
    """
    tokens = logprobs.argmax(dim=-1)
    if not settings.all_greedy:
        kept = _kept(logprobs, settings)
        tokens = torch.where(settings.greedy[:, 0], tokens, _draw(kept, random[:, :1]))
    if allowed is None:
        return Chosen(tokens)
    redrawn = ~allowed.gather(1, tokens[:, None])[:, 0]
    removed = redrawn.double()
    within = logprobs.masked_fill(~allowed, -torch.inf)
    again = within.argmax(dim=-1)
    if not settings.all_greedy:
        remaining = kept * allowed
        share = remaining.sum(-1) / kept.sum(-1)
        removed = torch.where(settings.greedy[:, 0], removed, (1 - share).clamp(0, 1))
        if redrawn.any():
            none = remaining.sum(-1, keepdim=True) == 0
            remaining = torch.where(none, _kept(within, settings), remaining) if none.any() else remaining
            again = torch.where(settings.greedy[:, 0], again, _draw(remaining, random[:, 1:]))
    return Chosen(torch.where(redrawn, again, tokens), removed, redrawn)


def _draw(probabilities: Tensor, random: Tensor) -> Tensor:
    """The token of each row [b, v] at which the running sum passes its random number [b, 1], int64 [b]."""
    # In the order of the ids: of two tokens that are almost alike, rounding decides which comes first in the
    # order of likelihood, and so would decide which of them a random number means.
    reached = probabilities.cumsum(dim=-1)
    place = torch.searchsorted(reached, random * reached[:, -1:], right=True)
    # Rounding may point behind the last token that was kept.
    numbers = torch.arange(probabilities.shape[1], device=probabilities.device)
    return place.minimum((numbers * (probabilities > 0)).amax(dim=-1, keepdim=True))[:, 0]


def _kept(logprobs: Tensor, settings: RowSettings) -> Tensor:
    """Probabilities of the tokens that the settings keep, float64 [b, v]; their sum may be less than 1."""
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
    return probabilities
