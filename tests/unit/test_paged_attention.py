"""The kernels of generation over a paged cache, against fp64, against torch's own, and against themselves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_codec import _csrc
from megatron_codec.inference import kernels
from megatron_codec.inference.kernels import PieceArrays, paged_attention, rotate_and_store
from megatron_codec.model import kernels as model_kernels
from megatron_codec.model.layers import Rotate
from tests.paged import (
    CASES,
    B,
    Piece,
    arrays_of,
    call_of,
    decode,
    distance,
    formula,
    ints,
    pieces_of_rows,
    prefill,
    shared,
    together,
    torch_kernel,
)

needs_amx = pytest.mark.skipif(not _csrc.has_amx(), reason="this processor has no AMX")


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
