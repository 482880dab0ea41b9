"""Products with packed weights, in bf16 and int8, against fp64 and torch's own."""

import pytest
import torch
from torch.nn import functional as F

from megatron_codec import _csrc
from megatron_codec.inference.linear import make_linear, quantize
from megatron_codec.inference.packed import PackedLinear
from megatron_codec.model import kernels as model_kernels

needs_amx = pytest.mark.skipif(not _csrc.has_amx(), reason="this processor has no AMX")
in_both = pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
# out, in: of the layers of a model, of a padded vocabulary, and out that fills no whole panel or tile.
SHAPES = [(2304, 768), (768, 2048), (384, 768), (1376, 4096), (48, 32), (20, 64), (1, 1056)]
ROWS = 0, 1, 2, 15, 16, 17, 32, 33, 100


def weight_of(out: int, width: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Channels of different magnitudes."""
    generator = torch.Generator().manual_seed(out + width)
    magnitudes = torch.randn(out, 1, generator=generator).exp()
    return (torch.randn(out, width, generator=generator) * magnitudes * 0.02).to(dtype)


def rows_of(t: int, width: int) -> torch.Tensor:
    return torch.randn(t, width, generator=torch.Generator().manual_seed(t)).bfloat16()


def packed_linear(out: int, width: int, int8: bool) -> PackedLinear:
    linear = make_linear(weight_of(out, width), int8)
    assert isinstance(linear, PackedLinear)
    return linear


def exact(x: torch.Tensor, weight: torch.Tensor, int8: bool) -> torch.Tensor:
    if int8:
        q, scales = quantize(weight)
        weight = q.double() * scales.double()[:, None]
    return x.double() @ weight.double().T


def distance(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true).norm() / true.norm())


@needs_amx
@in_both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_the_formula(shape, int8):
    """Hardly further from fp64 than the nearest bf16 number is, and than torch's own product."""
    weight, linear = weight_of(*shape), packed_linear(*shape, int8)
    for t in ROWS:
        x = rows_of(t, shape[1])
        ours, true = linear(x), exact(x, weight, int8)
        assert ours.dtype == torch.bfloat16 and ours.shape == true.shape
        if t:
            assert distance(ours, true) <= 1.01 * distance(true.bfloat16(), true) + 1e-4
            q, scales = quantize(weight)
            torchs = F.linear(x, (q * scales[:, None]).bfloat16() if int8 else weight)
            assert distance(ours, true) <= 1.05 * distance(torchs, true) + 1e-4


@needs_amx
@in_both
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_the_others(shape, int8):
    """Bit for bit, and not on what they hold."""
    linear = packed_linear(*shape, int8)
    x = rows_of(100, shape[1])
    together = linear(x)
    for t in ROWS:
        assert torch.equal(linear(x[:t]), together[:t])
    x[1:] = torch.inf
    for t in (1, 2, 17, 100):
        assert torch.equal(linear(x[:t])[0], together[0])


@needs_amx
@in_both
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_threads(threads, own_threads, int8, monkeypatch):
    """Bit for bit, from OpenMP's threads or new ones."""
    linears = [packed_linear(*shape, int8) for shape in SHAPES]
    calls = [(linear, rows_of(t, linear.width)) for linear in linears for t in ROWS]
    expected = [linear(x) for linear, x in calls]
    before = torch.get_num_threads()
    if own_threads:
        monkeypatch.setattr(model_kernels, "_openmp", lambda: 0)
    torch.set_num_threads(threads)
    try:
        assert all(torch.equal(linear(x), right) for (linear, x), right in zip(calls, expected, strict=True))
    finally:
        torch.set_num_threads(before)


@needs_amx
@in_both
def test_numbers_of_any_size(int8):
    """The kernel's int8 sums are 2^24 times as large for a while; numbers that models have stand it."""
    weight = weight_of(64, 64)
    x = rows_of(4, 64) * torch.tensor([[1e-25], [1e-3], [1e3], [1e25]])
    x = x.bfloat16()
    ours, true = make_linear(weight, int8)(x), exact(x, weight, int8)
    for row, right in zip(ours, true, strict=True):
        assert distance(row, right) < 3e-3


@needs_amx
@in_both
def test_what_does_not_go_together_is_refused(int8):
    linear = packed_linear(64, 64, int8)
    for x in (torch.zeros(2, 64), torch.zeros(2, 32).bfloat16(), torch.zeros(64).bfloat16()):
        with pytest.raises(ValueError, match="x has to be bf16"):
            linear(x)
    rows = rows_of(4, 128)[:, ::2]  # not contiguous
    assert torch.equal(linear(rows), linear(rows.contiguous()))


@in_both
@pytest.mark.parametrize(
    ("out", "width", "dtype"), [(64, 48, torch.bfloat16), (64, 64, torch.float32), (7, 5, torch.float32)]
)
def test_what_the_kernel_does_not_take_goes_to_torch(out, width, dtype, int8):
    weight = weight_of(out, width, dtype)
    linear = make_linear(weight, int8)
    assert not isinstance(linear, PackedLinear)
    x = rows_of(9, width).to(dtype)
    assert linear(x).dtype == dtype
    assert distance(linear(x), exact(x, weight, int8)) < (1e-6 if dtype == torch.float32 else 4e-3)


@in_both
def test_a_processor_without_amx(int8, monkeypatch):
    """oneDNN's layout in bf16, torch in int8."""
    monkeypatch.setattr(_csrc, "has_amx", lambda: False)
    weight = weight_of(2304, 768)
    linear = make_linear(weight, int8)
    assert not isinstance(linear, PackedLinear)
    for t in ROWS[1:]:
        x = rows_of(t, 768)
        assert distance(linear(x), exact(x, weight, int8)) < 4e-3
