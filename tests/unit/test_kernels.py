"""The bf16 kernels of csrc/ against fp64, against torch's own, and against themselves."""

import pytest
import torch
from torch.nn import functional as F

from megatron_codec import _csrc
from megatron_codec.model import kernels
from megatron_codec.model.layers import RMSNorm, Rotary, Rotate, SdpaAttention, SwiGLU
from tests.unit.test_model_layers import attention, config_of, gradients

needs_amx = pytest.mark.skipif(not _csrc.has_amx(), reason="this processor has no AMX")
SHAPES = [  # s, b, n, g, d
    (32, 1, 1, 1, 32),
    (37, 2, 2, 2, 64),
    (33, 3, 6, 1, 32),
    (304, 2, 2, 2, 64),
    (129, 1, 4, 2, 128),
    (2, 1, 1, 1, 64),
    (200, 1, 2, 1, 128),
    (31, 1, 12, 4, 64),
]


def mixed(s: int, b: int, n: int, g: int, d: int, seed: int = 0):
    """Query, key, value as Megatron-Core cuts them: views of one tensor [s, b, g, (n / g + 2) * d]."""
    generator = torch.Generator().manual_seed(seed)
    together = torch.randn(s, b, g, (n // g + 2) * d, generator=generator).bfloat16()
    query, key, value = together.split([n // g * d, d, d], -1)
    weights = torch.randn(s, b, n * d, generator=generator).bfloat16()
    inputs = [x.detach().requires_grad_() for x in (query.reshape(s, b, n, d), key, value)]
    return inputs, weights


def exact(query, key, value, rotary: Rotary, scale: float):
    """The formula in fp64, with its s x s matrix: [s, b, n * d]."""
    s, _, n, _ = query.shape
    cos, sin = rotary.tables(s, torch.device("cpu"))
    query, key, value = (x.double().permute(1, 2, 0, 3) for x in (query, key, value))
    query, key = (Rotate.apply(x, cos.double(), sin.double()) for x in (query, key))
    key, value = (x.repeat_interleave(n // x.shape[1], 1) for x in (key, value))
    future = torch.ones(s, s, dtype=torch.bool).triu(1)
    scores = (query @ key.transpose(-1, -2) * scale).masked_fill(future, -torch.inf)
    return (scores.softmax(-1) @ value).permute(2, 0, 1, 3).flatten(2)


def distance(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true.double()).norm().detach() / true.norm().detach())


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_attention_is_the_formula(shape):
    """Not further from fp64 than torch's kernels on bf16 are, forward and backward."""
    *_, n, g, d = shape
    inputs, weights = mixed(*shape)
    rotary = Rotary(d, 10000)
    config = config_of(g, num_heads=n, width=d)
    results = []
    for fused in (True, False):
        module = attention(SdpaAttention, config, rotary=rotary, fused=fused)
        output = module(*inputs, None)
        assert (output.grad_fn.next_functions[0][0].name() == "AttentionBackward") is fused
        results.append((output, *gradients(output, weights, *inputs)))
    output = exact(*inputs, rotary, d**-0.5)
    true = (output, *gradients(output, weights.double(), *inputs))
    for ours, other, right in zip(*results, true, strict=True):
        assert distance(ours, right) <= 1.05 * distance(other, right) + 1e-3


@needs_amx
def test_attention_of_one_token_is_its_value():
    inputs, _ = mixed(1, 2, 2, 2, 64)
    output = attention(SdpaAttention, config_of(2, num_heads=2, width=64), rotary=Rotary(64, 10000))(
        *inputs, None
    )
    assert torch.equal(output, inputs[2].flatten(2))


@needs_amx
def test_attention_does_not_see_the_future():
    inputs, _ = mixed(100, 1, 2, 2, 64)
    module = attention(SdpaAttention, config_of(2, num_heads=2, width=64), rotary=Rotary(64, 10000))
    before = module(*inputs, None)
    with torch.no_grad():
        for x in inputs:
            x[77:] = 1000.0
    after = module(*inputs, None)
    assert torch.equal(before[:77], after[:77])
    assert not torch.equal(before[77:], after[77:])


@needs_amx
def test_attention_stands_scores_far_apart():
    """Exponentials of scores in the hundreds, large first and large last, neither overflow nor vanish."""
    inputs, weights = mixed(300, 1, 1, 1, 64)
    rotary = Rotary(64, 10000)
    columns = []
    for fused in (True, False):
        module = attention(
            SdpaAttention,
            config_of(1, num_heads=1, width=64),
            rotary=rotary,
            softmax_scale=8.0,
            fused=fused,
        )
        output = module(*inputs, None)
        columns.append((output, *gradients(output, weights, *inputs)))
    output = exact(*inputs, rotary, 8.0)
    true = output, *gradients(output, weights.double(), *inputs)
    for ours, other, right in zip(*columns, true, strict=True):
        assert ours.isfinite().all()
        assert distance(ours, right) <= 1.05 * distance(other, right)


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_threads(threads, own_threads, monkeypatch):
    """Bit for bit, from OpenMP's threads or new ones."""
    norm = RMSNorm(config_of(params_dtype=torch.bfloat16), 96)
    layers = {
        "attention": attention(SdpaAttention, config_of(2, num_heads=4, width=64), rotary=Rotary(64, 10000)),
        "norm": norm,
        "swiglu": SwiGLU(config_of()),
    }
    rows = torch.randn(77, 5, 96, generator=torch.Generator().manual_seed(1)).bfloat16().requires_grad_()
    heads, weights = mixed(150, 3, 4, 2, 64)

    def run() -> list[torch.Tensor]:
        output, normed, product = (
            layers["attention"](*heads, None),
            norm(rows),
            layers["swiglu"](norm(rows)[..., :64]),
        )
        return [
            *(output, normed, product),
            *gradients(output, weights, *heads),
            *gradients(normed, rows.detach(), rows, norm.weight),
            *gradients(product, rows.detach()[..., :32], rows),
        ]

    expected = run()
    before = torch.get_num_threads()
    if own_threads:
        monkeypatch.setattr(kernels, "_openmp", lambda: 0)
    torch.set_num_threads(threads)
    try:
        for _ in range(3):
            assert all(torch.equal(x, y) for x, y in zip(run(), expected, strict=True))
    finally:
        torch.set_num_threads(before)


def test_what_the_kernels_do_not_take_goes_to_torch():
    """fp32, widths that are no multiple of a register, and processors without AMX."""
    assert not kernels.fits(torch.empty(1, 64), 64)
    assert not kernels.fits(torch.empty(1, 48, dtype=torch.bfloat16), 48)
    assert not kernels.fits(torch.empty(1, 64, dtype=torch.bfloat16, device="meta"), 64)
    rotary = Rotary(96, 10000)  # not a width of the attention kernel
    inputs, _ = mixed(40, 1, 2, 2, 96)
    output = attention(SdpaAttention, config_of(2, num_heads=2, width=96), rotary=rotary)(*inputs, None)
    assert distance(output, exact(*inputs, rotary, 96**-0.5)) < 0.01


@needs_amx
@pytest.mark.parametrize("width", [32, 128, 4096])
def test_norm_and_swiglu_are_the_formulas(width):
    """Not further from fp64 than torch's kernels on bf16 are; odd numbers of rows, many and one."""
    for rows in (1, 33, 101):
        generator = torch.Generator().manual_seed(rows)
        x = (3 * torch.randn(rows, 2 * width, generator=generator)).bfloat16().requires_grad_()
        weights = torch.randn(rows, 2 * width, generator=generator).bfloat16()
        norms = [
            RMSNorm(config_of(params_dtype=torch.bfloat16), 2 * width, fused=fused) for fused in (True, False)
        ]
        for norm in norms:
            norm.weight.data = torch.randn(2 * width, generator=torch.Generator().manual_seed(3)).bfloat16()
        true = F.rms_norm(x.double(), (2 * width,), norms[0].weight.double(), 1e-5)
        _close(x, weights, [(norm(x), norm.weight) for norm in norms], (true, norms[0].weight))
        gate, up = x.double().chunk(2, -1)
        both = [(SwiGLU(config_of(), fused=fused)(x), None) for fused in (True, False)]
        _close(x, weights[:, :width], both, (F.silu(gate) * up, None))


def _close(x, weights, ours_and_other, true):
    columns = []
    for output, weight in (*ours_and_other, true):
        inputs = [x] if weight is None else [x, weight]
        columns.append((output, *gradients(output, weights.to(output.dtype), *inputs)))
    for ours, other, right in zip(*columns, strict=True):
        assert distance(ours, right) <= 1.05 * distance(other, right) + 1e-3


@needs_amx
def test_swiglu_of_large_numbers_is_finite():
    x = torch.tensor([[-300.0, 300.0, -1e30, 1e30] * 8 + [2.0] * 32]).bfloat16().requires_grad_()
    output = SwiGLU(config_of())(x)
    (slope,) = torch.autograd.grad(output.sum(), x)
    torch.testing.assert_close(output, F.silu(x[:, :32]) * x[:, 32:])
    assert torch.equal(slope[0, :4], torch.tensor([0.0, 2.0, 0.0, 2.0]).bfloat16())
