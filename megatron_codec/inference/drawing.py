"""From a step's logits to tokens: what each sample gets next, under its settings and its grammar."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from megatron_codec.codecs import Codec
from megatron_codec.inference.config import EngineConfig
from megatron_codec.inference.healing import narrow
from megatron_codec.inference.masks import Masks
from megatron_codec.inference.sampling import RowSettings, choose
from megatron_codec.inference.scheduler import Part, Sample
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Drawn:
    """What one sample got.

    Attributes:
        logprob: natural log-probability of the token under the model, before temperature and cuts.
        top: the `Sampling.logprobs` likeliest tokens with theirs.
        removed: the probability that the grammar took away from what the settings kept.
        redrawn: whether the grammar put it in place of what had come without it.
    """

    token: int
    logprob: float
    top: dict[int, float]
    removed: float
    redrawn: bool


class Drawing:
    """Draws for the samples of one engine. It is always on the CPU: its many small steps would take longer on
    a GPU.

    Args:
        width: of a row of logits, the padded vocabulary.

    Attributes:
        forbidden: fp32 [width], -inf for what is never chosen: padding of the embedding, BOS, and ids that
            stand for nothing.
        masks: the grammar's.
    """

    def __init__(self, codec: Codec, tokenizer: Tokenizer, width: int, config: EngineConfig):
        self.forbidden = torch.zeros(width)
        self.forbidden[tokenizer.num_tokens :] = -torch.inf
        self.forbidden[[tokenizer.bos, *tokenizer.unused]] = -torch.inf
        device = self.forbidden.device
        self.masks = Masks(codec, tokenizer, width, device, config.canonical, config.in_range)
        self._settings: tuple[tuple[int, ...], RowSettings] | None = None

    def draw(self, samples: Sequence[Sample], logits: Tensor) -> list[Drawn]:
        """A token for each sample, from its row of logits [b, width]."""
        logprobs = torch.log_softmax(logits + self.forbidden, dim=-1)
        random = torch.from_numpy(np.stack([s.random[s.new_tokens] for s in samples]))
        choices = [sample.choice for sample in samples]
        cursors = [s.cursor if c is None else None for s, c in zip(samples, choices, strict=True)]
        allowed = self.masks.of(cursors, [s.limit - s.new_tokens for s in samples])
        drawn, allowed = narrow(logprobs, allowed, choices)
        tokens, removed, redrawn = choose(
            drawn, self._settings_of(samples), random.to(logprobs.device), allowed
        )
        count = len(samples)
        lost = [0.0] * count if removed is None else removed.tolist()
        again = [False] * count if redrawn is None else redrawn.tolist()
        chosen = logprobs.gather(1, tokens[:, None])[:, 0].tolist()
        asked = [sample.request.sampling.logprobs for sample in samples]
        likeliest = _likeliest(logprobs, max(asked)) if max(asked) else [{}] * count
        top = [dict(list(row.items())[:n]) for row, n in zip(likeliest, asked, strict=True)]
        return [Drawn(*of_one) for of_one in zip(tokens.tolist(), chosen, top, lost, again, strict=True)]

    def score_prompt(self, part: Part, logits: Tensor) -> None:
        """Log-probabilities of the prompt's tokens behind those of the part."""
        request = part.sample.request
        stop = min(part.stop + 1, len(request.prompt))
        logprobs = torch.log_softmax(logits[: stop - part.start - 1] + self.forbidden, dim=-1)
        tokens = request.prompt[part.start + 1 : stop]
        chosen = logprobs.gather(1, torch.tensor(tokens, device=logprobs.device)[:, None])[:, 0]
        request.prompt_logprobs[part.start + 1 : stop] = chosen.tolist()
        request.prompt_top_logprobs[part.start + 1 : stop] = _likeliest(logprobs, request.sampling.logprobs)

    def _settings_of(self, samples: Sequence[Sample]) -> RowSettings:
        """The sampling settings of these rows; mostly those of the step before."""
        numbers = tuple(sample.request.number for sample in samples)
        if self._settings is None or self._settings[0] != numbers:
            settings = RowSettings([sample.request.sampling for sample in samples], self.forbidden.device)
            self._settings = numbers, settings
        return self._settings[1]


def _likeliest(logprobs: Tensor, count: int) -> list[dict[int, float]]:
    """The `count` likeliest tokens of each row [b, v], the likeliest first."""
    values, ids = logprobs.topk(count, dim=-1)
    return [dict(zip(i, v, strict=True)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
