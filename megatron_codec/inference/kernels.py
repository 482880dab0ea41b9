"""Attention over the paged key-value cache on a CPU, by the kernels of csrc/: in bf16 with AMX, and for rows
that decode on any processor (`row_attention`).

Results do not depend on the number of threads, and those of a row not on the other rows of a call. Tensors
are contiguous and on the CPU. The functions run in every layer of every decoding step, and check no more
than types and shapes.

Shapes: T tokens of a forward pass ("rows"), n heads of this tensor-parallel rank, g key-value groups, d head
width, B tokens of a block. A pool is [blocks, g, B, d], bf16 where nothing else is said.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_codec import _csrc
from megatron_codec.model.kernels import HEAD_WIDTHS, team

_NAMES = "starts", "lengths", "blocks", "block_offsets", "rows", "row_offsets"


@dataclass(frozen=True, eq=False)
class PieceArrays:
    """The keys that the rows of a forward pass may see, in pieces; made once for all of its layers.

    Piece p covers the positions `starts[p]` to `starts[p] + lengths[p] - 1` of a sequence. Their keys and
    values lie in the blocks `blocks[block_offsets[p] : block_offsets[p + 1]]` of the pools, from the first
    place of the first. The rows `rows[row_offsets[p] : row_offsets[p + 1]]` see it, each as far as its own
    position. A row may have several pieces (a prompt that samples share, and its own rest): its softmax is
    over all of them.

    All int32; not to be changed afterwards, since the kernel reads them where they are.

    Raises:
        ValueError: of what type or length an array has to be.
    """

    starts: Tensor
    lengths: Tensor
    blocks: Tensor
    block_offsets: Tensor
    rows: Tensor
    row_offsets: Tensor
    num_pieces: int
    pieces: _csrc.Pieces = field(init=False, repr=False)

    def __post_init__(self):
        tensors = [getattr(self, name) for name in _NAMES]
        for name, tensor in zip(_NAMES, tensors, strict=True):
            if tensor.dtype != torch.int32 or tensor.dim() != 1 or not _at_hand(tensor):
                raise ValueError(f"{name}: a contiguous int32 vector on the CPU")
        for name, more in (("starts", 0), ("lengths", 0), ("block_offsets", 1), ("row_offsets", 1)):
            if len(getattr(self, name)) != self.num_pieces + more:
                raise ValueError(f"{name}: {self.num_pieces + more} numbers for {self.num_pieces} pieces")
        if self.block_offsets[-1] != len(self.blocks) or self.row_offsets[-1] != len(self.rows):
            raise ValueError("block_offsets and row_offsets end where blocks and rows do")
        pieces = _csrc.Pieces(self.num_pieces, *(tensor.data_ptr() for tensor in tensors))
        object.__setattr__(self, "pieces", pieces)


def fits(x: Tensor, width: int, block: int = 32) -> bool:
    """Whether the kernels take tensors like `x`, heads of that width, and blocks of so many tokens.

    To be asked before the first call of the others: it also asks the system for the use of AMX.
    """
    return (
        x.dtype == torch.bfloat16
        and x.device.type == "cpu"
        and width in HEAD_WIDTHS
        and block % 32 == 0
        and _csrc.has_amx()
    )


def rotate_and_store(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    query: Tensor | None = None,
) -> Tensor:
    """Rotates queries and keys, puts keys and values into their pools, and returns the queries [T, n, d].

    Args:
        qkv: bf16 [T, g, n / g + 2, d], of each group its queries, its key and its value.
        cos, sin: of the rotary embedding's angles, fp32 [positions, d / 2].
        positions: of the tokens in their sequences, int64 [T].
        slots: block * B + place in the block, int64 [T]; where it is negative the key is not stored.
        keys, values: the pools.
        query: where to put the queries, bf16 [T, n, d].

    Raises:
        ValueError: where a tensor is not as said above, or a slot or position is out of range.
    """
    t, g, each, d = qkv.shape
    n = g * (each - 2)
    if query is None:
        query = qkv.new_empty(t, n, d)
    blocks, groups, block, width = keys.shape
    good = (
        _at_hand(qkv, keys, values, query, cos, sin, positions, slots)
        and qkv.dtype == keys.dtype == values.dtype == query.dtype == torch.bfloat16
        and cos.dtype == sin.dtype == torch.float32
        and positions.dtype == slots.dtype == torch.int64
        and (groups, width) == (g, d)
        and values.shape == keys.shape
        and query.shape == (t, n, d)
        and cos.shape == sin.shape
        and cos.shape[1] * 2 == d
        and len(positions) == len(slots) == t
    )
    if not good:
        raise _mistake(qkv, cos, sin, positions, slots, keys, values, query)
    _csrc.rotate_and_store(
        team(),
        _csrc.PagedShape(n, g, block, d, 1.0),
        t,
        *(qkv.data_ptr(), cos.data_ptr(), sin.data_ptr(), len(cos), positions.data_ptr(), slots.data_ptr()),
        *(keys.data_ptr(), values.data_ptr(), blocks, query.data_ptr()),
    )
    return query


def paged_attention(
    query: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    pieces: PieceArrays,
    scale: float,
    output: Tensor | None = None,
) -> Tensor:
    """Attends queries [T, n, d], rotated, to the pieces of the cache that they see, giving [T, n, d].

    The softmax is in fp32; the products take its weights in bf16. A row that sees nothing gets zeros.

    Args:
        query: bf16 [T, n, d].
        positions: of the rows in their sequences, int64 [T]; a row sees no key of a later position.
        keys, values: the pools. Keys are rotated; what is stored in a piece has to be finite.
        pieces: which row sees what.
        scale: of the scores.
        output: where to put the result, bf16 [T, n, d].

    Raises:
        ValueError: where a tensor is not as said above, or a piece names rows or blocks that are not there.
    """
    if output is None:
        output = torch.empty_like(query)
    if query.dtype != torch.bfloat16:
        raise _mistake(query, positions, keys, values, output)
    shape, places = _attention(query, positions, keys, values, scale, output)
    _csrc.paged_attention(team(), *shape, *places, pieces.pieces, output.data_ptr())
    return output


def fits_rows(x: Tensor, width: int) -> bool:
    """Whether `row_attention` takes tensors like `x` and heads of that width."""
    return x.dtype in (torch.bfloat16, torch.float32) and x.device.type == "cpu" and width % 8 == 0


def row_attention(
    query: Tensor,
    positions: Tensor,
    keys: Tensor,
    values: Tensor,
    pieces: PieceArrays,
    scale: float,
    output: Tensor,
) -> None:
    """`paged_attention` on any processor, in bf16 or fp32 and for any width that is a multiple of 8.

    Meant for rows that decode: keys that many rows share are read once for each. Products and sums are in
    fp32. Rows of no piece stay as they are in `output`.

    Raises:
        ValueError: as `paged_attention`.
    """
    if not fits_rows(query, query.shape[-1]):
        raise _mistake(query, positions, keys, values, output)
    shape, places = _attention(query, positions, keys, values, scale, output)
    _csrc.row_attention(
        team(), *shape, query.dtype == torch.float32, *places, pieces.pieces, output.data_ptr()
    )


def _attention(
    query: Tensor, positions: Tensor, keys: Tensor, values: Tensor, scale: float, output: Tensor
) -> tuple[tuple[_csrc.PagedShape, int], tuple[int, int, int, int, int]]:
    """The shape of a call and its rows; its addresses and the blocks of the pools.

    Raises:
        ValueError: where types and shapes do not go together.
    """
    (t, n, d), (blocks, g, block, width) = query.shape, keys.shape
    good = (
        _at_hand(query, keys, values, output, positions)
        and query.dtype == keys.dtype == values.dtype == output.dtype
        and positions.dtype == torch.int64
        and width == d
        and n % g == 0
        and values.shape == keys.shape
        and output.shape == query.shape
        and len(positions) == t
    )
    if not good:
        raise _mistake(query, positions, keys, values, output)
    addresses = query.data_ptr(), positions.data_ptr(), keys.data_ptr(), values.data_ptr()
    return (_csrc.PagedShape(n, g, block, d, scale), t), (*addresses, blocks)


def _at_hand(*tensors: Tensor) -> bool:
    for x in tensors:  # noqa: SIM110  all() takes twice the time
        if not (x.is_contiguous() and x.is_cpu):
            return False
    return True


def _mistake(*tensors: Tensor) -> ValueError:
    got = ", ".join(f"{x.dtype} {list(x.shape)}" for x in tensors)
    return ValueError(f"tensors that do not go together, or are not contiguous on the CPU: {got}")
