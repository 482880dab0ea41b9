"""The rotary embedding and the attention of rows that decode, over the paged key-value cache, on a GPU.

In Triton, which comes with torch for CUDA. A row has a table of its blocks; blocks that rows share are read
by each of them, from the GPU's cache as far as it goes. The keys of a row are cut into parts that are
computed side by side and merged, since one or a few rows would leave most of the GPU idle.

Source: Dao et al., "Flash-Decoding for long-context inference" (2023), on Kwon et al.'s blocks (`blocks.py`).

Shapes: t rows, b rows that decode, n heads, g key-value groups, q = n / g, d head width, w blocks of a table.
"""

# Triton is not everywhere, and its language is not quite Python.
# pyright: reportMissingImports=false, reportIndexIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false, reportOperatorIssue=false

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_codec.inference.blocks import BLOCK

_TILE = 64  # keys at a time
_PROGRAMS = 512  # enough to fill a GPU
_MOST_PARTS = 32


@triton.jit
def _rotate_and_store(
    qkv,
    cos,
    sin,
    positions,
    slots,
    query,
    keys,
    values,
    groups,
    position_stride,
    slot_stride,
    QUERIES: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row, vector = tl.program_id(0), tl.program_id(1)
    group, kind = vector // (QUERIES + 2), vector % (QUERIES + 2)
    half: tl.constexpr = WIDTH // 2
    i = tl.arange(0, PADDED)
    inside = i < half
    source = qkv + (row.to(tl.int64) * groups * (QUERIES + 2) + vector) * WIDTH
    first = tl.load(source + i, mask=inside, other=0).to(tl.float32)
    second = tl.load(source + half + i, mask=inside, other=0).to(tl.float32)
    position = tl.load(positions + row * position_stride).to(tl.int64)
    slot = tl.load(slots + row * slot_stride).to(tl.int64)
    if kind <= QUERIES:
        c = tl.load(cos + position * half + i, mask=inside, other=0).to(tl.float32)
        s = tl.load(sin + position * half + i, mask=inside, other=0).to(tl.float32)
        turned = first * c - second * s
        second = second * c + first * s
        first = turned
    place = ((slot // BLOCK * groups + group) * BLOCK + slot % BLOCK) * WIDTH
    if kind < QUERIES:
        place = ((row * groups + group) * QUERIES + kind).to(tl.int64) * WIDTH
        tl.store(query + place + i, first.to(query.dtype.element_ty), mask=inside)
        tl.store(query + place + half + i, second.to(query.dtype.element_ty), mask=inside)
    elif kind == QUERIES:
        tl.store(keys + place + i, first.to(keys.dtype.element_ty), mask=inside)
        tl.store(keys + place + half + i, second.to(keys.dtype.element_ty), mask=inside)
    else:
        tl.store(values + place + i, first.to(values.dtype.element_ty), mask=inside)
        tl.store(values + place + half + i, second.to(values.dtype.element_ty), mask=inside)


@triton.jit
def _attend(
    query,
    keys,
    values,
    positions,
    tables,
    sums,
    most,
    totals,
    scale,
    heads,
    groups,
    position_stride,
    table_stride,
    PARTS: tl.constexpr,
    WIDTH: tl.constexpr,
    PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
):
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    group = head // (heads // groups)
    i = tl.arange(0, PADDED)
    inside = i < WIDTH
    length = tl.load(positions + row * position_stride).to(tl.int32) + 1
    size = tl.cdiv(tl.cdiv(length, PARTS), TILE) * TILE
    start = part * size
    end = tl.minimum(start + size, length)
    at = (row * heads + head).to(tl.int64)
    q = tl.load(query + at * WIDTH + i, mask=inside, other=0).to(tl.float32) * scale
    largest = -float("inf")
    total = 0.0
    sum_ = tl.zeros([PADDED], tl.float32)
    first = start
    while first < end:
        key = first + tl.arange(0, TILE)
        seen = key < end
        block = tl.load(tables + row * table_stride + key // BLOCK, mask=seen, other=0).to(tl.int64)
        place = ((block * groups + group) * BLOCK + key % BLOCK) * WIDTH
        mask = seen[:, None] & inside[None, :]
        k = tl.load(keys + place[:, None] + i[None, :], mask=mask, other=0).to(tl.float32)
        score = tl.where(seen, tl.sum(k * q[None, :], 1), -float("inf"))
        larger = tl.maximum(largest, tl.max(score, 0))
        weight = tl.exp(score - larger)
        kept = tl.exp(largest - larger)
        v = tl.load(values + place[:, None] + i[None, :], mask=mask, other=0).to(tl.float32)
        sum_ = sum_ * kept + tl.sum(weight[:, None] * v, 0)
        total = total * kept + tl.sum(weight, 0)
        largest = larger
        first += TILE
    at = at * PARTS + part
    tl.store(sums + at * WIDTH + i, sum_, mask=inside)
    tl.store(most + at, largest)
    tl.store(totals + at, total)


@triton.jit
def _merge(sums, most, totals, out, PARTS: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    at = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, PARTS)
    i = tl.arange(0, PADDED)
    inside = i < WIDTH
    largest = tl.load(most + at * PARTS + part)
    # The first part is never empty; an empty one has -inf.
    kept = tl.exp(largest - tl.max(largest, 0))
    total = tl.sum(tl.load(totals + at * PARTS + part) * kept, 0)
    places = (at * PARTS + part)[:, None] * WIDTH + i[None, :]
    each = tl.load(sums + places, mask=inside[None, :], other=0)
    result = tl.sum(each * kept[:, None], 0) / total
    tl.store(out + at * WIDTH + i, result.to(out.dtype.element_ty), mask=inside)


def rotate_and_store(
    qkv: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, slots: Tensor, keys: Tensor, values: Tensor
) -> Tensor:
    """Turns queries and keys by their positions and writes keys and values into the cache.

    Args:
        qkv: [t, g, q + 2, d] of each group its queries, its key, its value.
        cos, sin: fp32 [positions, d / 2].
        positions, slots: integers [t], of any stride.
        keys, values: of a layer in the cache, [blocks, g, BLOCK, d].

    Returns:
        The queries, [t, g, q, d].
    """
    qkv = qkv.contiguous()
    rows, groups, vectors, width = qkv.shape
    query = qkv.new_empty(rows, groups, vectors - 2, width)
    _rotate_and_store[(rows, groups * vectors)](
        *(qkv, cos, sin, positions, slots, query, keys, values, groups),
        *(positions.stride(0), slots.stride(0)),
        QUERIES=vectors - 2,
        WIDTH=width,
        PADDED=triton.next_power_of_2(width // 2),
        BLOCK=BLOCK,
        num_warps=1,
    )
    return query


def attend(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, tables: Tensor, scale: float, out: Tensor
) -> None:
    """Writes the attention of rows that decode to `out` [b, g, q, d].

    Args:
        query: turned, [b, g, q, d].
        keys, values: of a layer in the cache, [blocks, g, BLOCK, d]; a row sees its own key too.
        positions: integers [b], of any stride.
        tables: int32 [b, w], the blocks of each row in order; its rows may lie apart.
    """
    rows, groups, queries, width = query.shape
    heads, padded = groups * queries, triton.next_power_of_2(width)
    parts = min(_MOST_PARTS, triton.next_power_of_2(triton.cdiv(_PROGRAMS, rows * heads)))
    sums = torch.empty(rows * heads * parts, width, dtype=torch.float32, device=query.device)
    most, totals = torch.empty(2, rows * heads * parts, dtype=torch.float32, device=query.device)
    _attend[(rows, heads, parts)](
        *(query, keys, values, positions, tables, sums, most, totals, scale, heads, groups),
        *(positions.stride(0), tables.stride(0)),
        PARTS=parts,
        WIDTH=width,
        PADDED=padded,
        BLOCK=BLOCK,
        TILE=_TILE,
        num_warps=4,
    )
    _merge[(rows * heads,)](sums, most, totals, out, PARTS=parts, WIDTH=width, PADDED=padded, num_warps=1)
