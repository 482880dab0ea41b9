"""Micro-batches: which samples of the stream this process computes at which step, read ahead of time.

Step t takes samples t * B to t * B + B - 1 of the stream, B the global batch size, whatever the layout;
micro-batch m of data-parallel rank r takes rows m * DP * b + r * b onwards, b the micro-batch size.
"""

import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from megatron_codec.config import TrainingConfig
from megatron_codec.data.blend import Samples
from megatron_codec.parallel import Layout


class Loader:
    """Reads the micro-batches of this process, while the model computes those before.

    Args:
        workers: threads that read ahead (NumPy copies without the interpreter's lock); 0 reads when asked.
        last: no step after this one is read ahead.

    Attributes:
        waited: seconds that the model has waited for data so far.
    """

    def __init__(
        self, samples: Samples, training: TrainingConfig, layout: Layout, workers: int = 0, last: int = 0
    ):
        self.samples, self.waited = samples, 0.0
        self._training, self._layout, self._last = training, layout, last
        self._pool = ThreadPoolExecutor(workers, "data") if workers else None
        self._ahead: dict[int, deque[Future[torch.Tensor]]] = {}

    def step(self, iteration: int) -> Iterator[dict[str, torch.Tensor]]:
        """Yields the micro-batches of one step, in order.

        Yields:
            `tokens`, `labels` and `position_ids`, each int64 [micro_batch_size, seq_length / CP], and
            `loss_mask`, float32 of the same shape, 0 where the label is padding.
        """
        if self._pool is None:
            for start in self._starts():
                began = time.perf_counter()
                packed = self._read(iteration, start)
                self.waited += time.perf_counter() - began
                yield self._batch(packed)
            return
        self._read_ahead(iteration)
        self._ahead = {i: kept for i, kept in self._ahead.items() if i >= iteration}
        waiting = self._ahead[iteration]
        while waiting:
            began = time.perf_counter()
            packed = waiting.popleft().result()
            self.waited += time.perf_counter() - began
            if not waiting:
                self._read_ahead(iteration + 1)
            yield self._batch(packed)

    def close(self) -> None:
        """Ends the threads."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _starts(self) -> range:
        """First rows, within the global batch, of each micro-batch of all data-parallel ranks together."""
        return range(0, self._training.global_batch_size, self._training.micro_batch_size * self._layout.dp)

    def _read_ahead(self, iteration: int) -> None:
        if self._pool is not None and iteration not in self._ahead and iteration <= self._last:
            pool = self._pool
            self._ahead[iteration] = deque(
                pool.submit(self._read, iteration, start) for start in self._starts()
            )

    def _read(self, iteration: int, start: int) -> torch.Tensor:
        size = self._training.micro_batch_size
        first = iteration * self._training.global_batch_size + start + self._layout.dp_rank * size
        packed = torch.from_numpy(np.stack([self.samples.sample(first + i) for i in range(size)]))
        # Only from pinned memory does the copy to a GPU run beside the computation.
        return packed.pin_memory() if self._layout.device.type == "cuda" else packed

    def _batch(self, packed: torch.Tensor) -> dict[str, torch.Tensor]:
        packed = packed.to(self._layout.device, non_blocking=True)
        positions = self._layout.positions(packed.shape[1] - 1)
        tokens, labels = packed[:, positions], packed[:, positions + 1]
        return {
            "tokens": tokens.clamp(min=0),
            "labels": labels.clamp(min=0),
            "position_ids": positions.expand_as(tokens),
            "loss_mask": (labels >= 0).float(),
        }
