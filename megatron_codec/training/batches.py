"""Micro-batches: which samples of the packed stream this process computes at which step.

Step t takes samples t * B to t * B + B - 1 of the stream, B the global batch size, whatever the layout;
micro-batch m of data-parallel rank r takes rows m * DP * b + r * b onwards, b the micro-batch size.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch


class Samples(Protocol):
    """A sequence of rows to train on (`PackedSamples`) or to evaluate with (`DocumentRows`)."""

    seq_length: int

    def sample(self, index: int) -> np.ndarray:
        """Token ids of row `index`, int64 [seq_length + 1]; -1 where there is nothing to predict."""
        ...


def microbatches(
    samples: Samples,
    iteration: int,
    global_batch_size: int,
    micro_batch_size: int,
    dp_rank: int,
    dp: int,
    device: torch.device,
) -> Iterator[dict[str, torch.Tensor]]:
    """Yields this rank's micro-batches of one step, in order.

    Yields:
        `tokens`, `labels` and `position_ids`, each int64 [micro_batch_size, seq_length], and `loss_mask`,
        float32 of the same shape, 0 where the label is padding.
    """
    first = iteration * global_batch_size
    for start in range(0, global_batch_size, micro_batch_size * dp):
        rows = first + start + dp_rank * micro_batch_size + np.arange(micro_batch_size)
        packed = torch.from_numpy(np.stack([samples.sample(int(row)) for row in rows])).to(device)
        tokens, labels = packed[:, :-1].clamp(min=0), packed[:, 1:].clamp(min=0)
        yield {
            "tokens": tokens,
            "labels": labels,
            "position_ids": torch.arange(tokens.shape[1], device=device).expand_as(tokens),
            "loss_mask": (packed[:, 1:] >= 0).float(),
        }
