"""Attention of rows that decode, on any processor, against fp64, torch's own, and the engine without it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_codec.inference import kernels
from megatron_codec.inference.attention import _Gathered
from megatron_codec.inference.kernels import fits_rows, row_attention
from megatron_codec.inference.step import Piece as StepPiece
from tests.paged import (
    CASES,
    Piece,
    arrays_of,
    call_of,
    decode,
    distance,
    formula,
    pieces_of_rows,
    prefill,
    shared,
    together,
    torch_kernel,
)


@pytest.mark.parametrize("shape", [(2, 2, 64), (6, 2, 128), (4, 1, 40)], ids=str)
@pytest.mark.parametrize("case", CASES)
def test_it_is_the_formula(case, shape):
    """In fp32 to its precision; in bf16 not further from fp64 than torch's kernel is."""
    call = call_of(CASES[case], *shape)
    true = call.by(formula)
    assert distance(call.run_rows(), true) <= 1.05 * distance(call.by(torch_kernel), true) + 1e-3
    assert distance(call.wide().run_rows(), true) < 3e-6


@settings(max_examples=60, deadline=None)
@given(pieces_of_rows(), st.sampled_from([(1, 1), (4, 2), (3, 1)]), st.sampled_from([8, 32, 72]))
def test_any_pieces_give_the_formula(pieces, heads, d):
    call = call_of(pieces, *heads, d).wide()
    torch.testing.assert_close(call.run_rows().double(), call.by(formula), rtol=1e-4, atol=1e-5)


def test_scores_far_apart():
    """Exponentials of scores in the hundreds neither overflow nor vanish."""
    call = call_of(together(decode(1500), shared(64, 3, 40)), 2, 1, 64, spread=100.0).wide()
    assert distance(call.run_rows(), call.by(formula)) < 1e-4


def test_rows_of_no_piece_are_left_and_those_that_see_nothing_get_zeros():
    call = call_of([*decode(40, 90), Piece(64, 10, {3: 5, 1: 89})], 2, 2, 64)
    output = call.run_rows()
    assert output[:2].isfinite().all() and output[:2].all()
    assert output[2].isnan().all() and not output[3].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_results_depend_on_neither_threads_nor_other_rows(threads):
    pieces = together(decode(90, 700), shared(1056, 3, 40), decode(33))
    call = call_of(pieces, 4, 2, 64)
    expected, before = call.run_rows(), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(call.run_rows(), expected)
    finally:
        torch.set_num_threads(before)
    tables = [x.tolist() for x in call.arrays.blocks.split(call.arrays.block_offsets.diff().tolist())]
    for row in range(len(expected)):
        alone = [Piece(p.start, p.length, {row: p.rows[row]} if row in p.rows else {}) for p in pieces]
        call.arrays = arrays_of(alone, tables)
        assert torch.equal(call.run_rows()[row], expected[row])


def test_what_does_not_go_together_is_refused():
    call = call_of(decode(40, 2), 2, 2, 64)
    tensors = call.query, call.positions, call.keys, call.values
    with pytest.raises(ValueError, match="do not go together"):
        row_attention(call.query.float(), *tensors[1:], call.arrays, 1.0, torch.empty_like(call.query))
    with pytest.raises(ValueError, match="do not go together"):
        row_attention(*tensors, call.arrays, 1.0, torch.empty_like(call.query).transpose(0, 1))
    with pytest.raises(ValueError, match="do not go together"):
        half = [x.half() for x in (call.query, call.keys, call.values)]
        row_attention(half[0], call.positions, *half[1:], call.arrays, 1.0, torch.empty_like(half[0]))
    with pytest.raises(ValueError, match="a block is not in the pool"):
        pools = call.keys[:1], call.values[:1]
        row_attention(*tensors[:2], *pools, call.arrays, 1.0, torch.empty_like(call.query))
    assert fits_rows(call.query, 64) and fits_rows(call.query.float(), 72)
    assert not fits_rows(call.query, 60) and not fits_rows(call.query.half(), 64)
    assert not fits_rows(call.query.to("meta"), 64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(2, 2), (6, 2)], ids=str)
def test_it_stands_in_for_what_is_gathered(dtype, heads, monkeypatch):
    """Rows that decode, some of one prompt, beside parts of prompts: as a GPU without Triton has them."""
    call = call_of(together(decode(90, 300), shared(64, 3, 40), prefill(200, 33)), *heads, 64)
    n, g = heads
    query, keys, values = (x.to(dtype).nan_to_num() for x in (call.query, call.keys, call.values))
    query = query.view(len(query), g, n // g, 64)
    tables = [x.tolist() for x in call.arrays.blocks.split(call.arrays.block_offsets.diff().tolist())]
    pieces = [StepPiece(p.start, p.length, t, list(p.rows)) for p, t in zip(call.pieces, tables, strict=True)]
    calls = []
    kernel = kernels.row_attention
    monkeypatch.setattr(kernels, "row_attention", lambda *a: calls.append(1) or kernel(*a))
    found, expected = (
        _Gathered(pieces, call.positions, in_place).attend(
            query, keys, values, call.scale, query.new_zeros(query.shape)
        )
        for in_place in (True, False)
    )
    assert len(calls) == 1 and found.any(-1).all()
    close = {"rtol": 1e-5, "atol": 1e-6} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.01}
    torch.testing.assert_close(found, expected, **close)
