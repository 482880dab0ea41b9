"""Attention of a step's rows over the blocks of the key-value cache.

Keys are stored rotated, so that a step rotates its own tokens and no earlier one is touched again. On a CPU
with AMX, in bf16, the kernels of csrc/ read the blocks where they lie (`kernels.py`); for rows that decode
others do so on any CPU, and those of `gpu_kernels.py` on a GPU. Everywhere else torch gathers them first.
Which of them computes is decided once; tests hold all against the whole model.

Shapes: t rows, n heads, g key-value groups, q = n / g queries of each, d head width, k keys.
"""

import math
from dataclasses import fields
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from megatron_codec.inference import kernels
from megatron_codec.inference.blocks import BLOCK
from megatron_codec.inference.step import Piece, PieceIndex, Step
from megatron_codec.model.layers import Rotary, Rotate
from megatron_codec.model.products import attention, multiply


class PagedAttention:
    """Makes the attention of every layer of a step.

    Args:
        heads, groups: of this tensor-parallel rank.
        width: of a head.
        max_length: positions that there are.
    """

    def __init__(
        self,
        heads: int,
        groups: int,
        width: int,
        rotary_base: float,
        max_length: int,
        dtype: torch.dtype,
        device: torch.device,
    ):
        self.heads, self.groups, self.width, self.device = heads, groups, width, device
        self.scale = 1.0 / math.sqrt(width)
        self.like = torch.empty(0, dtype=dtype, device=device)
        self.fused = kernels.fits(self.like, width, BLOCK)
        self.on_gpu = device.type == "cuda" and find_spec("triton") is not None
        self.cos, self.sin = Rotary(width, rotary_base).tables(max_length, device)

    def begin(self, step: Step) -> None:
        """Prepares what all layers of a step share."""
        self.positions, self.slots = (
            torch.from_numpy(numbers).to(self.device) for numbers in (step.positions, step.slots)
        )
        if self.fused:
            self.pieces = _arrays(step.pieces)
        elif self.on_gpu:
            decoding = len(step.tables)
            width = max(map(len, step.tables), default=0)
            # What lies in the blocks of the padding is not seen.
            tables = [table + [0] * (width - len(table)) for table in step.tables]
            self.tables = torch.tensor(tables, dtype=torch.int32).to(self.device)
            of_prompts = [piece for piece in step.pieces if piece.rows[0] >= decoding]
            self.gathered = _Gathered(of_prompts, self.positions) if of_prompts else None
        else:
            in_place = kernels.fits_rows(self.like, self.width)
            self.gathered = _Gathered(step.pieces, self.positions, in_place)
            self.turns = tuple(table[self.positions][:, None, None] for table in (self.cos, self.sin))

    def begin_decoding(self, positions: Tensor, slots: Tensor, tables: Tensor) -> None:
        """The same on a GPU for a step of nothing but rows that decode.

        Args:
            positions, slots: int32 [b].
            tables: int32 [b, w], the blocks of each row.
        """
        self.positions, self.slots, self.tables, self.gathered = positions, slots, tables, None

    def __call__(self, qkv: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """The attention of a layer, [t, n * d].

        Args:
            qkv: Megatron-Core's, [t, g * (q + 2) * d]: of each group its queries, its key, its value.
            keys, values: of the layer in the cache, [blocks, g, BLOCK, d]; those of the step are written.
        """
        together = qkv.view(len(qkv), self.groups, -1, self.width)
        if self.fused:
            query = kernels.rotate_and_store(
                together, self.cos, self.sin, self.positions, self.slots, keys, values
            )
            return kernels.paged_attention(
                query, self.positions, keys, values, self.pieces, self.scale
            ).flatten(1)
        if self.on_gpu:
            return self._on_gpu(together, keys, values).flatten(1)
        blocks, offsets = self.slots // BLOCK, self.slots % BLOCK
        keys[blocks, :, offsets] = Rotate.apply(together[:, :, -2:-1], *self.turns)[:, :, 0]
        values[blocks, :, offsets] = together[:, :, -1]
        query = Rotate.apply(together[:, :, :-2], *self.turns)
        assert self.gathered is not None
        return self.gathered.attend(query, keys, values, self.scale, query.new_empty(query.shape)).flatten(1)

    def _on_gpu(self, together: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        from megatron_codec.inference import gpu_kernels  # which imports Triton

        query = gpu_kernels.rotate_and_store(
            together, self.cos, self.sin, self.positions, self.slots, keys, values
        )
        result, decoding = torch.empty_like(query), len(self.tables)
        if decoding:
            gpu_kernels.attend(
                query[:decoding], keys, values, self.positions, self.tables, self.scale, result
            )
        if self.gathered is not None:
            self.gathered.attend(query, keys, values, self.scale, result)
        return result


def _arrays(pieces: list[Piece]) -> kernels.PieceArrays:
    """As the kernels of csrc/ take them."""
    index = PieceIndex.of(pieces)
    arrays = {f.name: torch.from_numpy(getattr(index, f.name)) for f in fields(index)}
    return kernels.PieceArrays(**arrays, num_pieces=len(pieces))


class _Gathered:
    """Attention by torch's own operators, on keys that are gathered from their blocks.

    Parts of prompts see one piece each and go through torch's fused attention. Rows that decode may see
    several; their pieces are computed apart, those of one row all together, and merged.

    Args:
        in_place: the rows that decode go through `kernels.row_attention`, which gathers nothing.
    """

    def __init__(self, pieces: list[Piece], positions: Tensor, in_place: bool = False):
        device = positions.device
        self.positions = positions
        self.in_place: kernels.PieceArrays | None = None
        times = np.bincount(np.fromiter((row for p in pieces for row in p.rows), np.int64))
        self.prompts, self.shared, single = [], [], []
        for piece in pieces:
            if len(piece.rows) == 1:
                single.append(piece)
                continue
            rows, blocks = (torch.tensor(numbers, device=device) for numbers in (piece.rows, piece.blocks))
            kind = self.prompts if times[piece.rows[0]] == 1 else self.shared
            kind.append((piece.start, piece.length, rows, blocks))
        self.has_single = bool(single)
        if single and in_place:
            decoding = [p for p in pieces if len(p.rows) == 1 or times[p.rows[0]] > 1]
            self.in_place = _arrays(decoding)
        elif single:
            longest = max(len(piece.blocks) for piece in single)
            # What lies in the blocks of the padding is masked.
            table = [piece.blocks + piece.blocks[:1] * (longest - len(piece.blocks)) for piece in single]
            self.single_table = torch.tensor(table, device=device)
            self.single_rows = torch.tensor([piece.rows[0] for piece in single], device=device)
            lengths = torch.tensor([piece.length for piece in single], device=device)
            self.single_mask = torch.arange(longest * BLOCK, device=device) < lengths[:, None]

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, result: Tensor) -> Tensor:
        """Writes the rows of its pieces to `result`, [t, g, q, d], of rotated queries of that shape."""
        for start, length, rows, blocks in self.prompts:
            k, v = (store[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for store in (keys, values))
            positions = self.positions[rows]
            mask = torch.arange(start, start + length, device=query.device) <= positions[:, None]
            out = attention(
                query[rows].permute(1, 2, 0, 3),  # [g, q, rows, d]
                k[:, None],
                v[:, None],
                attn_mask=mask,
                scale=scale,
                enable_gqa=True,
            )
            result[rows] = out.permute(2, 0, 1, 3)
        if self.in_place is not None:
            heads, each = (x.flatten(1, 2) for x in (query, result))  # [t, n, d]; the second is a view
            kernels.row_attention(heads, self.positions, keys, values, self.in_place, scale, each)
        elif self.has_single:
            self._decode(query, keys, values, scale, result)
        return result

    def _decode(self, query: Tensor, keys: Tensor, values: Tensor, scale: float, result: Tensor) -> None:
        """Writes the rows that decode: softmax over their pieces together, in fp32.

        Source: Milakov and Gimelshein, "Online normalizer calculation for softmax" (2018), section 3.1.
        """
        rows = self.single_rows
        # [rows, g, q, k] = [rows, g, q, d] x [rows, g, d, k]
        k, v = (store[self.single_table].transpose(1, 2).flatten(2, 3) for store in (keys, values))
        scores = multiply(query[rows], k.transpose(2, 3)).float() * scale
        scores = scores.masked_fill(~self.single_mask[:, None, None], -torch.inf)
        most = scores.amax(-1, keepdim=True)
        weights = (scores - most).exp()
        total, product = weights.sum(-1, keepdim=True), multiply(weights.to(v.dtype), v).float()
        if self.shared:
            place = torch.full((len(query),), -1, device=query.device)
            place[rows] = torch.arange(len(rows), device=query.device)
        for _, length, shared_rows, blocks in self.shared:
            k, v = (store[blocks].transpose(0, 1).flatten(1, 2)[:, :length] for store in (keys, values))
            q = query[shared_rows].transpose(0, 1)  # [g, rows, q, d]
            scores = multiply(q.flatten(1, 2), k.transpose(1, 2)).float().unflatten(1, q.shape[1:3]) * scale
            at = place[shared_rows]
            before = most[at]
            most[at] = torch.maximum(before, scores.amax(-1, keepdim=True).transpose(0, 1))
            weights = (scores - most[at].transpose(0, 1)).exp()
            kept = (before - most[at]).exp()
            total[at] = total[at] * kept + weights.sum(-1, keepdim=True).transpose(0, 1)
            added = multiply(weights.to(v.dtype).flatten(1, 2), v).float().unflatten(1, q.shape[1:3])
            product[at] = product[at] * kept + added.transpose(0, 1)
        result[rows] = (product / total).to(result.dtype)
