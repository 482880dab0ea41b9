"""Log-probabilities in the format of OpenAI's completions."""

import math
from collections.abc import Sequence
from typing import Any

from megatron_codec.inference.server.text import Vocabulary

LEAST = -9999.0  # for minus infinity, which JSON does not have; vLLM's number


def finite(logprob: float | None) -> float | None:
    """The log-probability as JSON can say it."""
    return logprob if logprob is None or math.isfinite(logprob) else LEAST


def completion_logprobs(
    vocabulary: Vocabulary,
    ids: Sequence[int],
    logprobs: Sequence[float | None],
    top_logprobs: Sequence[dict[int, float]],
    offset: int = 0,
) -> dict[str, Any]:
    """The object `logprobs` of a choice.

    Args:
        logprobs: of each token; None for one that nothing precedes.
        top_logprobs: the likeliest tokens in the place of each.
        offset: where in the text the first token stands.
    """
    tokens, offsets, tops = [], [], []
    for id, logprob, likeliest in zip(ids, logprobs, top_logprobs, strict=True):
        tokens.append(vocabulary.name[id])
        offsets.append(offset)
        offset += len(vocabulary.text[id])
        if logprob is None:
            tops.append(None)
            continue
        # The chosen token is always among them, as there; two ids of the same bytes share a name.
        top: dict[str, float | None] = {}
        for other, value in likeliest.items():
            top.setdefault(vocabulary.name[other], finite(value))
        top.setdefault(vocabulary.name[id], finite(logprob))
        tops.append(top)
    return {
        "tokens": tokens,
        "token_logprobs": [finite(logprob) for logprob in logprobs],
        "top_logprobs": tops,
        "text_offset": offsets,
    }
