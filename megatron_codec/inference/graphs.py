"""Decoding steps as CUDA graphs: the kernels of a step are recorded once and then started together.

To start them one by one takes the CPU longer than they take a GPU (docs/performance.md). A graph reads its
step from one buffer: of each row token, position, slot and the blocks of its sequence. There is a graph for
each power of two of rows; rows that are left over compute the first row again, to the same end.

Steps with parts of prompts are computed as they come, and all steps are where TP or PP share them.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_codec.inference.blocks import blocks_for
from megatron_codec.inference.step import Step


class DecodeGraphs:
    """The graphs of one decoder, recorded when they are first wanted.

    Args:
        compute: (tokens, positions, slots [b], tables [b, w]; int32) to logits [b, v], of any stride.
        max_rows: of a step.
        max_length: tokens that a sequence may have.
        record: False calls `compute` each time, on any device, for tests.
    """

    def __init__(
        self,
        compute: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
        max_rows: int,
        max_length: int,
        device: torch.device,
        record: bool = True,
    ):
        self._compute, self._record = compute, record
        shape = (1 << (max_rows - 1).bit_length(), 3 + blocks_for(max_length))
        self._here = torch.zeros(shape, dtype=torch.int32, pin_memory=device.type == "cuda")
        self._there = torch.zeros(shape, dtype=torch.int32, device=device)
        self._graphs: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        self._pool = torch.cuda.graph_pool_handle() if record else None

    @staticmethod
    def takes(step: Step) -> bool:
        """Whether every row of the step decodes and its logits are wanted."""
        return len(step.tokens) == len(step.tables) == len(step.wanted)

    def __call__(self, step: Step) -> Tensor:
        """The logits of a step that it `takes`, [rows, v]; they stay until the next step."""
        rows = len(step.tokens)
        size = 1 << (rows - 1).bit_length()
        numbers = self._here.numpy()
        numbers[:rows, 0], numbers[:rows, 1], numbers[:rows, 2] = step.tokens, step.positions, step.slots
        for row, table in enumerate(step.tables):
            numbers[row, 3 : 3 + len(table)] = table
        numbers[rows:size] = numbers[0]
        self._there[:size].copy_(self._here[:size], non_blocking=True)
        if not self._record:
            return self._run(size)[:rows]
        if size not in self._graphs:
            self._graphs[size] = self._recorded(size)
        graph, logits = self._graphs[size]
        graph.replay()
        return logits[:rows]

    def _run(self, size: int) -> Tensor:
        numbers = self._there[:size]
        return self._compute(numbers[:, 0], numbers[:, 1], numbers[:, 2], numbers[:, 3:])

    def _recorded(self, size: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # What kernels and libraries do when they first run cannot be recorded.
        before = torch.cuda.Stream()
        before.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(before):
            self._run(size)
        torch.cuda.current_stream().wait_stream(before)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as NCCL's, may do as they like meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._run(size)
        return graph, logits
