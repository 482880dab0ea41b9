"""Attention of a step's rows over the blocks of the key-value cache.

Keys are stored rotated, so that a step rotates its own tokens and no earlier one is touched again. On a CPU
with AMX, in bf16, the kernels of csrc/ read the blocks where they lie; everywhere else torch gathers them.

Shapes: t rows, n heads, g key-value groups, d head width, k keys of a piece.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from megatron_codec.inference.blocks import BLOCK
from megatron_codec.inference.step import Step
from megatron_codec.model.layers import Rotary, Rotate


class PagedAttention:
    """Makes the attention of every layer of a step.

    Args:
        heads, groups: of this tensor-parallel rank.
        max_length: positions that there are.
    """

    def __init__(
        self, heads: int, groups: int, width: int, rotary_base: float, max_length: int, device: torch.device
    ):
        self.heads, self.groups, self.width, self.device = heads, groups, width, device
        self.scale = 1.0 / math.sqrt(width)
        self.max_length = max_length
        self.rotary = Rotary(width, rotary_base)

    def begin(self, step: Step) -> None:
        """Prepares what all layers of a step share."""
        device = self.device
        self.positions = torch.from_numpy(step.positions).to(device)
        slots = torch.from_numpy(step.slots).to(device)
        self.blocks, self.offsets = slots // BLOCK, slots % BLOCK
        self.tables = None
        # Rows in one piece only are finished there; the results of others are merged.
        times = torch.zeros(len(step.tokens), dtype=torch.long)
        self.pieces = []
        for piece in step.pieces:
            rows = torch.tensor(piece.rows)
            times[rows] += 1
            blocks = torch.tensor(piece.blocks, device=device)
            self.pieces.append((piece.start, piece.length, blocks, rows.to(device)))
        self.alone = [bool((times[piece.rows] == 1).all()) for piece in step.pieces]
        self.merges = not all(self.alone)

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The attention of a layer, [t, n * d].

        Args:
            qkv: Megatron-Core's, [t, g * (n / g + 2) * d]: of each group its queries, its key, its value.
            keys, values: of the layer in the cache, [blocks, g, BLOCK, d]; those of the step are written.
        """
        if self.tables is None:
            cos, sin = self.rotary.tables(self.max_length, like=qkv)
            self.tables = cos[self.positions][:, None, None], sin[self.positions][:, None, None]
        together = qkv.view(len(qkv), self.groups, -1, self.width)
        query = Rotate.apply(together[:, :, :-2], *self.tables)
        keys[self.blocks, :, self.offsets] = Rotate.apply(together[:, :, -2:-1], *self.tables)[:, :, 0]
        values[self.blocks, :, self.offsets] = together[:, :, -1]
        if self.merges:
            return self._merged(query, keys, values)
        result = torch.empty_like(query)
        for start, length, blocks, rows in self.pieces:
            k, v = (_gather(store, blocks, length) for store in (keys, values))
            mask = self._mask(start, length, rows)
            # A piece's rows attend to its keys, each group's queries together: [g, rows, n / g, d].
            q = query[rows].transpose(0, 1)
            out = F.scaled_dot_product_attention(
                q.transpose(1, 2).flatten(0, 1)[None],
                k.repeat_interleave(q.shape[2], 0)[None],
                v.repeat_interleave(q.shape[2], 0)[None],
                attn_mask=mask,
                scale=self.scale,
            )
            result[rows] = out[0].unflatten(0, (self.groups, -1)).permute(2, 0, 1, 3)
        return result.flatten(1)

    def _merged(self, query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Softmax over all pieces of a row together, from its maximum, sum and product with each.

        Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1.
        """
        shape = query.shape[:3]  # t, g, n / g
        most = query.new_full(shape, -torch.inf, dtype=torch.float32)
        total = torch.zeros(shape, device=query.device)
        result = torch.zeros(*shape, self.width, device=query.device)
        for start, length, blocks, rows in self.pieces:
            k, v = (_gather(store, blocks, length) for store in (keys, values))
            q = query[rows].transpose(0, 1)  # [g, rows, n / g, d]
            scores = (q.flatten(1, 2) @ k.transpose(1, 2)).float().unflatten(1, q.shape[1:3]) * self.scale
            mask = self._mask(start, length, rows)
            if mask is not None:
                scores = scores.masked_fill(~mask[None, :, None], -torch.inf)
            before = most[rows]
            here = torch.maximum(before, scores.amax(-1).transpose(0, 1))
            weights = (scores - here.transpose(0, 1)[..., None]).exp()
            kept = (before - here).exp()
            product = (weights.to(v.dtype).flatten(1, 2) @ v).float().unflatten(1, q.shape[1:3])
            most[rows] = here
            total[rows] = total[rows] * kept + weights.sum(-1).transpose(0, 1)
            result[rows] = result[rows] * kept[..., None] + product.transpose(0, 1)
        return (result / total[..., None]).to(query.dtype).flatten(1)

    def _mask(self, start: int, length: int, rows: Tensor) -> Tensor | None:
        """True where a row sees a key, [rows, k]; None where every row sees all."""
        positions = self.positions[rows]
        if int(positions.min()) >= start + length - 1:
            return None
        return torch.arange(start, start + length, device=self.device) <= positions[:, None]


def _gather(store: Tensor, blocks: Tensor, length: int) -> Tensor:
    """The keys (or values) in these blocks in order, [g, length, d]."""
    return store[blocks].transpose(0, 1).flatten(1, 2)[:, :length]
