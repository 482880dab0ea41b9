"""What one forward pass of the engine computes: some tokens of some sequences, and the keys they may see.

Rows are the tokens of a step: one of each sequence that is being continued, then parts of prompts. What
earlier tokens a row sees is given in pieces: a piece is a run of keys in blocks of the cache, and the rows
that see it. Samples of one prompt share the piece of the prompt, which so is read once for all of them.

Source: Athiwaratkun et al., "Bifurcated Attention for Single-Context Large-Batch Sampling" (2024); here for
any number of levels.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, chain

import numpy as np

from megatron_codec.inference.blocks import BLOCK


@dataclass
class Piece:
    """Keys at positions `start` to `start + length - 1`, in `blocks`, seen by `rows`.

    A row sees those that do not come after it.
    """

    start: int
    length: int
    blocks: list[int]
    rows: list[int]


@dataclass
class Step:
    """Plain numbers, so that it travels to the other processes of a layout.

    Attributes:
        tokens, positions, slots: int64 [rows]; token ids, their places in their sequences, and in the cache
            (block * BLOCK + offset).
        pieces: what the rows see.
        tables: the blocks of each row that decodes, in order; these rows come first.
        wanted: rows whose logits are wanted.
        copies: pairs of blocks, copied from the first to the second before anything else.
    """

    tokens: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    pieces: list[Piece]
    tables: list[list[int]]
    wanted: np.ndarray
    copies: list[tuple[int, int]] = field(default_factory=list)


@dataclass
class PieceIndex:
    """The numbers of all pieces one behind the other, int32, as kernels take them.

    Attributes:
        starts, lengths: [pieces].
        blocks, rows: of all pieces; those of piece i from `block_offsets[i]`, `row_offsets[i]` to the next.
        block_offsets, row_offsets: [pieces + 1].
    """

    starts: np.ndarray
    lengths: np.ndarray
    blocks: np.ndarray
    block_offsets: np.ndarray
    rows: np.ndarray
    row_offsets: np.ndarray

    @classmethod
    def of(cls, pieces: Sequence[Piece]) -> "PieceIndex":
        """Of these pieces."""
        return cls(
            starts=np.array([piece.start for piece in pieces], np.int32),
            lengths=np.array([piece.length for piece in pieces], np.int32),
            **_one_behind_the_other("block", [piece.blocks for piece in pieces]),
            **_one_behind_the_other("row", [piece.rows for piece in pieces]),
        )


def _one_behind_the_other(name: str, lists: list[list[int]]) -> dict[str, np.ndarray]:
    offsets = np.array([0, *accumulate(map(len, lists))], np.int32)
    return {f"{name}s": np.fromiter(chain(*lists), np.int32, offsets[-1]), f"{name}_offsets": offsets}


def shared_pieces(rows: Sequence[tuple[int, int, list[int]]], depth: int = 0) -> Iterator[Piece]:
    """The pieces of rows that decode, where blocks that several have in common make one piece.

    Args:
        rows: (row, position, blocks) of each; its last block, that of its position, is its alone.
        depth: blocks before this number are spoken for; they are the same in all rows.
    """
    if len(rows) == 1:
        row, position, blocks = rows[0]
        yield Piece(depth * BLOCK, position + 1 - depth * BLOCK, blocks[depth:], [row])
        return
    end = min(position // BLOCK for _, position, _ in rows)
    for _, _, blocks in rows[1:]:
        end = _parting(rows[0][2], blocks, depth, end)
    if end > depth:
        yield Piece(depth * BLOCK, (end - depth) * BLOCK, rows[0][2][depth:end], [row for row, _, _ in rows])
    groups: dict[int, list[tuple[int, int, list[int]]]] = {}
    for row in rows:
        groups.setdefault(row[2][end], []).append(row)
    for group in groups.values():
        yield from shared_pieces(group, end)


def _parting(one: list[int], other: list[int], low: int, high: int) -> int:
    """Where two lists of blocks that are the same up to `low` part, at most `high`.

    Blocks are shared from the first on, so a look at one says it of all before it.
    """
    while low < high:
        middle = (low + high) // 2
        if one[middle] == other[middle]:
            low = middle + 1
        else:
            high = middle
    return low
