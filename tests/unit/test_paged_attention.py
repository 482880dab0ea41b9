"""The kernels of generation over a paged cache, against fp64, against torch's own, and against themselves."""

from dataclasses import dataclass
from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from megatron_codec import _csrc
from megatron_codec.inference import kernels
from megatron_codec.inference.kernels import PieceArrays, paged_attention, rotate_and_store
from megatron_codec.model import kernels as model_kernels
from megatron_codec.model.layers import Rotate

needs_amx = pytest.mark.skipif(not _csrc.has_amx(), reason="this processor has no AMX")
B = 32


@dataclass
class Piece:
    """Keys start .. start + length - 1, seen by `rows`, a dict of row to its position."""

    start: int
    length: int
    rows: dict[int, int]


@dataclass
class Call:
    """What paged_attention takes, and the pieces as they were asked for."""

    query: torch.Tensor
    positions: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    arrays: PieceArrays
    scale: float
    pieces: list[Piece]

    def run(self) -> torch.Tensor:
        return paged_attention(self.query, self.positions, self.keys, self.values, self.arrays, self.scale)

    def seen(self, row: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values that a row sees, [t, g, d] each, gathered one by one."""
        found = []
        for number, piece in enumerate(self.pieces):
            if row not in piece.rows:
                continue
            first = int(self.arrays.block_offsets[number])
            for place in range(piece.length):
                if piece.start + place <= piece.rows[row]:
                    found.append((int(self.arrays.blocks[first + place // B]), place % B))
        blocks, places = torch.tensor(found).reshape(-1, 2).T
        return self.keys[blocks, :, places], self.values[blocks, :, places]

    def by(self, attend) -> torch.Tensor:
        """Every row's [n, d] from `attend`, which takes [1, n, 1, d], [1, n, t, d] twice and the scale."""
        n, g = self.query.shape[1], self.keys.shape[1]
        result = []
        for row, query in enumerate(self.query):
            key, value = (x.transpose(0, 1).repeat_interleave(n // g, 0)[None] for x in self.seen(row))
            result.append(attend(query[None, :, None], key, value, self.scale)[0, :, 0])
        return torch.stack(result)


def formula(query, key, value, scale):
    query, key, value = query.double(), key.double(), value.double()
    return (query @ key.transpose(-1, -2) * scale).softmax(-1) @ value


def torch_kernel(query, key, value, scale):
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def ints(numbers) -> torch.Tensor:
    return torch.tensor(list(numbers), dtype=torch.int32)


def offsets(lists) -> torch.Tensor:
    return F.pad(ints(map(len, lists)).cumsum(0), (1, 0)).int()


def arrays_of(pieces: list[Piece], tables: list[list[int]]) -> PieceArrays:
    rows = [list(piece.rows) for piece in pieces]
    return PieceArrays(
        starts=ints(piece.start for piece in pieces),
        lengths=ints(piece.length for piece in pieces),
        blocks=ints(chain(*tables)),
        block_offsets=offsets(tables),
        rows=ints(chain(*rows)),
        row_offsets=offsets(rows),
        num_pieces=len(pieces),
    )


def call_of(pieces: list[Piece], n: int, g: int, d: int, seed: int = 0, spread: float = 1.0) -> Call:
    """Random numbers, blocks in random order; what is in no piece is NaN, keys and values alike."""
    generator = torch.Generator().manual_seed(seed)
    counts = [(piece.length + B - 1) // B for piece in pieces]
    order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
    tables = [[order.pop() for _ in range(count)] for count in counts]
    pools = torch.full((2, sum(counts) + 3, g, B, d), torch.nan).bfloat16()
    for piece, table in zip(pieces, tables, strict=True):
        for place in range(piece.length):
            pools[:, table[place // B], :, place % B] = torch.randn(2, g, d, generator=generator).bfloat16()
    positions = {row: position for piece in pieces for row, position in piece.rows.items()}
    t = max(positions, default=0) + 1
    query = (torch.randn(t, n, d, generator=generator) * spread).bfloat16()
    return Call(
        query=query,
        positions=torch.tensor([positions.get(row, 0) for row in range(t)]),
        keys=pools[0].contiguous(),
        values=pools[1].contiguous(),
        arrays=arrays_of(pieces, tables),
        scale=d**-0.5,
        pieces=pieces,
    )


def decode(*lengths: int) -> list[Piece]:
    """A row for each length, the last of a sequence of its own."""
    return [Piece(0, length, {row: length - 1}) for row, length in enumerate(lengths)]


def shared(prompt: int, *lengths: int) -> list[Piece]:
    """A prompt of a multiple of B tokens that all rows share, and so many tokens of each row's own."""
    rows = {row: prompt + length - 1 for row, length in enumerate(lengths)}
    own = [Piece(prompt, length, {row: rows[row]}) for row, length in enumerate(lengths)]
    return [Piece(0, prompt, rows), *own]


def prefill(length: int, count: int) -> list[Piece]:
    """The last `count` tokens of a sequence, in an order that is none."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count)).tolist()
    return [Piece(0, length, {row: length - count + place for place, row in enumerate(order)})]


def together(*groups: list[Piece]) -> list[Piece]:
    """Pieces of several calls in one: the rows of the later ones follow."""
    result, first = [], 0
    for pieces in groups:
        result += [Piece(p.start, p.length, {row + first: at for row, at in p.rows.items()}) for p in pieces]
        first = 1 + max(row for piece in result for row in piece.rows)
    return result


def distance(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true.double()).norm() / true.norm())


CASES = {
    "one row": decode(1100),
    "one key": decode(1),
    "borders": decode(1, 2, 31, 32, 33, 63, 64, 65, 127, 128, 129),
    "splits": decode(1023, 1024, 1025, 2048, 2049),
    "unequal": decode(3, 700, 50, 1500, 17, 17, 64, 300, 1, 33, 90, 512, 255, 257, 40, 128),
    "shared": shared(1056, *range(1, 9)),
    "shared by many": shared(160, *([5] * 40)),
    "prefill": prefill(300, 70),
    "prefill of all": prefill(65, 65),
    "long prefill": prefill(1500, 40),
    "together": together(prefill(200, 33), decode(90, 1200), shared(64, 3, 40), prefill(40, 40)),
}


@needs_amx
@pytest.mark.parametrize("shape", [(2, 2, 64), (4, 1, 32), (6, 2, 128), (12, 12, 64)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case, shape):
    """Not further from fp64 than torch's kernel on bf16 is."""
    call = call_of(CASES[case], *shape)
    true = call.by(formula)
    output = call.run()
    assert output.isfinite().all()
    assert distance(output, true) <= 1.05 * distance(call.by(torch_kernel), true) + 1e-3


@needs_amx
def test_multi_head_attention_of_llama_2_7b():
    call = call_of(together(decode(70, 33), prefill(80, 20)), 32, 32, 128)
    true = call.by(formula)
    assert distance(call.run(), true) <= 1.05 * distance(call.by(torch_kernel), true) + 1e-3


@st.composite
def pieces_of_rows(draw) -> list[Piece]:
    """Rows that see any pieces of a sequence up to any positions, in any order."""
    rows = {row: draw(st.integers(0, 200)) for row in range(draw(st.integers(1, 40)))}
    result = []
    for _ in range(draw(st.integers(1, 5))):
        start, length = B * draw(st.integers(0, 3)), draw(st.integers(1, 150))
        seen = draw(st.lists(st.sampled_from(sorted(rows)), unique=True))
        result.append(Piece(start, length, {row: rows[row] for row in seen}))
    everyone = Piece(0, 1, rows)  # so that no row sees nothing
    return [*result, everyone]


@needs_amx
@settings(max_examples=60, deadline=None)
@given(pieces_of_rows(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([32, 64, 128]))
def test_any_pieces_give_the_formula(pieces, heads, d):
    call = call_of(pieces, *heads, d)
    torch.testing.assert_close(call.run().double(), call.by(formula), rtol=0.02, atol=0.02)


@needs_amx
def test_scores_far_apart():
    """Exponentials of scores in the hundreds neither overflow nor vanish."""
    call = call_of(together(decode(1500), shared(64, 3, 40), prefill(100, 30)), 2, 1, 64, spread=100.0)
    true = call.by(formula)
    assert distance(call.run(), true) <= 1.05 * distance(call.by(torch_kernel), true) + 1e-3


@needs_amx
def test_a_row_that_sees_nothing_gets_zeros():
    """In no piece, in one without keys, or before its start: padding, that is."""
    pieces = [*decode(40, 2000), Piece(64, 10, {3: 5, 1: 1999}), Piece(0, 0, {4: 1})]
    call = call_of(pieces, 2, 2, 64)
    output = call.run()
    assert not output[2:].any()
    assert output[:2].all()
    none = PieceArrays(ints([]), ints([]), ints([]), ints([0]), ints([]), ints([0]), 0)
    assert not paged_attention(call.query, call.positions, call.keys, call.values, none, 1.0).any()


@needs_amx
@pytest.mark.parametrize("shape", [(12, 12, 64), (8, 2, 128), (4, 1, 32)], ids=str)
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_threads(shape, threads, own_threads, monkeypatch):
    """Bit for bit, from OpenMP's threads or new ones."""
    cases = [together(*CASES_OF_THREADS), shared(2080, *([3] * 40))]
    calls = [call_of(pieces, *shape) for pieces in cases]
    expected = [call.run() for call in calls]
    before = torch.get_num_threads()
    if own_threads:
        monkeypatch.setattr(model_kernels, "_openmp", lambda: 0)
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert all(torch.equal(call.run(), right) for call, right in zip(calls, expected, strict=True))
    finally:
        torch.set_num_threads(before)


CASES_OF_THREADS = (prefill(1300, 150), decode(90, 2500), shared(1056, 3, 40), prefill(40, 40))


@needs_amx
def test_a_row_does_not_depend_on_the_others():
    """Bit for bit: alone, or among so many that its piece is computed in another way."""
    call = call_of(together(shared(2112, *range(1, 70)), prefill(2100, 80)), 4, 2, 64)
    output = call.run()
    for row in (0, 17, 68, 69, 101, 148):
        t = len(call.query)
        alone = [Piece(p.start, p.length, {row: p.rows[row]} if row in p.rows else {}) for p in call.pieces]
        sizes = call.arrays.block_offsets.diff().tolist()
        tables = [x.tolist() for x in call.arrays.blocks.split(sizes)]
        one = paged_attention(
            call.query, call.positions, call.keys, call.values, arrays_of(alone, tables), call.scale
        )
        assert torch.equal(one[row], output[row])
        assert not one[torch.arange(t) != row].any()


@needs_amx
def test_larger_blocks():
    """Blocks of 96 tokens: three of 32 each, one after the other."""
    call = call_of(decode(96 * 3, 96 * 2), 4, 2, 64)
    pools = [
        x[call.arrays.blocks.long()].unflatten(0, (-1, 3)).transpose(1, 2).flatten(2, 3)
        for x in (call.keys, call.values)
    ]
    arrays = arrays_of(call.pieces, [[0, 1, 2], [3, 4]])
    output = paged_attention(
        call.query, call.positions, pools[0].contiguous(), pools[1].contiguous(), arrays, call.scale
    )
    assert torch.equal(output, call.run())


@needs_amx
@pytest.mark.parametrize(
    "shape", [(1, 2, 2, 64), (7, 6, 2, 32), (40, 32, 32, 128), (300, 12, 12, 64)], ids=str
)
def test_rotate_and_store(shape):
    """As Rotate does in fp32; tokens of negative slots, and all other slots, leave the pools alone."""
    t, n, g, d = shape
    generator = torch.Generator().manual_seed(t)
    qkv = torch.randn(t, g, n // g + 2, d, generator=generator).bfloat16()
    angles = torch.randn(500, d // 2, generator=generator)
    cos, sin = angles.cos(), angles.sin()
    positions = torch.randint(500, (t,), generator=generator)
    slots = torch.randperm(20 * B, generator=generator)[:t]
    slots[1::3] = -1
    pools = torch.randn(2, 20, g, B, d, generator=generator).bfloat16()
    keys, values = pools.clone()
    query = rotate_and_store(qkv, cos, sin, positions, slots, keys, values)
    turns = (x[positions][:, None, None] for x in (cos, sin))
    turned = Rotate.apply(qkv.float(), *turns)
    torch.testing.assert_close(query.float(), turned[:, :, :-2].flatten(1, 2), rtol=2**-8, atol=1e-6)
    kept = slots >= 0
    blocks, places = slots[kept] // B, slots[kept] % B
    torch.testing.assert_close(keys[blocks, :, places].float(), turned[kept, :, -2], rtol=2**-8, atol=1e-6)
    assert torch.equal(values[blocks, :, places], qkv[kept, :, -1])
    for pool, before in zip((keys, values), pools, strict=True):
        pool[blocks, :, places] = before[blocks, :, places]
        assert torch.equal(pool, before)


@needs_amx
def test_what_does_not_go_together_is_refused():
    call = call_of(decode(40, 2), 2, 2, 64)
    with pytest.raises(ValueError, match="do not go together"):
        paged_attention(call.query.float(), call.positions, call.keys, call.values, call.arrays, 1.0)
    with pytest.raises(ValueError, match="do not go together"):
        paged_attention(call.query, call.positions.int(), call.keys, call.values, call.arrays, 1.0)
    with pytest.raises(ValueError, match="a row is not in the query"):
        paged_attention(call.query[:1], call.positions[:1], call.keys, call.values, call.arrays, 1.0)
    with pytest.raises(ValueError, match="a block is not in the pool"):
        paged_attention(call.query, call.positions, call.keys[:1], call.values[:1], call.arrays, 1.0)
    with pytest.raises(ValueError, match="longer than its blocks"):
        arrays = arrays_of(call.pieces, [[0], [1]])
        paged_attention(call.query, call.positions, call.keys, call.values, arrays, 1.0)
    with pytest.raises(ValueError, match="starts: a contiguous int32"):
        PieceArrays(ints([0]).long(), ints([1]), ints([0]), ints([0, 1]), ints([0]), ints([0, 1]), 1)
    with pytest.raises(ValueError, match="row_offsets: 2 numbers for 1 pieces"):
        PieceArrays(ints([0]), ints([1]), ints([0]), ints([0, 1]), ints([0]), ints([0, 1, 1]), 1)
    qkv, angles = torch.zeros(1, 2, 3, 64).bfloat16(), torch.zeros(4, 32)
    for position, slot in ((4, 0), (-1, 0), (0, len(call.keys) * B)):
        numbers = torch.tensor([position]), torch.tensor([slot])
        with pytest.raises(ValueError, match=r"a (slot|position) is not in"):
            rotate_and_store(qkv, angles, angles, *numbers, call.keys, call.values)


def test_what_the_kernels_take():
    x = torch.empty(1, dtype=torch.bfloat16)
    assert kernels.fits(x, 64) is kernels.fits(x, 128, 64) is _csrc.has_amx()
    assert not kernels.fits(x, 96)
    assert not kernels.fits(x, 64, 16)
    assert not kernels.fits(x.float(), 64)
    assert not kernels.fits(x.to("meta"), 64)
