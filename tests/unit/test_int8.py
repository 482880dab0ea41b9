"""Weights in int8: the rounding, the product against fp64 and torch's own, an engine beside one in bf16."""

import gc
import weakref

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from megatron_codec import _csrc
from megatron_codec.inference import Engine, Sampling
from megatron_codec.inference.config import EngineConfig
from megatron_codec.inference.decoder import Decoder
from megatron_codec.inference.int8 import Int8Linear, quantize
from megatron_codec.inference.linear import make_linear
from megatron_codec.model import kernels as model_kernels
from megatron_codec.tokenizer import Tokenizer
from tests.llama import SMALL, small_model
from tests.tiny import CODEC

needs_amx = pytest.mark.skipif(not _csrc.has_amx(), reason="this processor has no AMX")
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


def exact(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    q, scales = quantize(weight)
    return x.double() @ (q.double() * scales.double()[:, None]).T


def distance(x: torch.Tensor, true: torch.Tensor) -> float:
    return float((x.double() - true).norm() / true.norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_within_half_a_step(dtype):
    weight = weight_of(200, 96, dtype)
    weight[3] = 0
    weight[4] *= 1e-30
    q, scales = quantize(weight)
    assert q.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (200,)
    error = (q.double() * scales.double()[:, None] - weight.double()).abs().amax(1)
    assert (error <= scales.double() * (0.5 + 1e-4)).all()
    assert not q[3].any() and (q.abs().amax(1)[scales > 0] == 127).all()


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product_is_the_formula(shape):
    """Hardly further from fp64 than the nearest bf16 number is, and so nearer than torch's bf16 product."""
    weight = weight_of(*shape)
    linear = make_linear(weight, int8=True)
    assert isinstance(linear, Int8Linear) and linear.fused
    q, scales = quantize(weight)
    dequantized = (q * scales[:, None]).bfloat16()
    for t in ROWS:
        x = rows_of(t, shape[1])
        ours, true = linear(x), exact(x, weight)
        assert ours.dtype == torch.bfloat16 and ours.shape == true.shape
        if t:
            nearest = distance(true.bfloat16(), true)
            assert distance(ours, true) <= 1.01 * nearest + 1e-4
            assert distance(ours, true) <= 1.05 * distance(F.linear(x, dequantized), true) + 1e-4


@needs_amx
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_row_does_not_depend_on_the_others(shape):
    """Bit for bit, and not on what they hold."""
    linear = Int8Linear(weight_of(*shape))
    x = rows_of(100, shape[1])
    together = linear(x)
    for t in ROWS:
        assert torch.equal(linear(x[:t]), together[:t])
    x[1:] = torch.inf
    for t in (1, 2, 17, 100):
        assert torch.equal(linear(x[:t])[0], together[0])


@needs_amx
@pytest.mark.parametrize("threads", [1, 2, 3, 7])
@pytest.mark.parametrize("own_threads", [False, True])
def test_results_do_not_depend_on_threads(threads, own_threads, monkeypatch):
    """Bit for bit, from OpenMP's threads or new ones."""
    linears = [Int8Linear(weight_of(*shape)) for shape in SHAPES]
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
def test_numbers_of_any_size():
    """The kernel's sums are 2^24 times as large for a while; numbers that models have stand it."""
    weight = weight_of(64, 64)
    x = rows_of(4, 64) * torch.tensor([[1e-25], [1e-3], [1e3], [1e25]])
    x = x.bfloat16()
    ours, true = Int8Linear(weight)(x), exact(x, weight)
    for row, right in zip(ours, true, strict=True):
        assert distance(row, right) < 3e-3


@needs_amx
def test_what_does_not_go_together_is_refused():
    linear = Int8Linear(weight_of(64, 64))
    for x in (torch.zeros(2, 64), torch.zeros(2, 32).bfloat16(), torch.zeros(64).bfloat16()):
        with pytest.raises(ValueError, match="x has to be bf16"):
            linear(x)
    rows = rows_of(4, 128)[:, ::2]  # not contiguous
    assert torch.equal(linear(rows), linear(rows.contiguous()))


@pytest.mark.parametrize(
    ("out", "width", "dtype"), [(64, 48, torch.bfloat16), (64, 64, torch.float32), (7, 5, torch.float32)]
)
def test_what_the_kernel_does_not_take_goes_to_torch(out, width, dtype):
    weight = weight_of(out, width, dtype)
    linear = Int8Linear(weight)
    assert not linear.fused and linear.weight.dtype == torch.int8
    x = rows_of(9, width).to(dtype)
    assert linear(x).dtype == dtype
    assert distance(linear(x), exact(x, weight)) < (1e-6 if dtype == torch.float32 else 4e-3)


def engine_of(dtype: torch.dtype, **config) -> Engine:
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    module, layout = model_in(dtype)
    return Engine(module, SMALL, tokenizer, CODEC, layout, EngineConfig(**config))


def model_in(dtype: torch.dtype):
    module, layout = small_model()
    module = module.to(dtype)
    module.config.params_dtype = dtype
    return module, layout


def prompt_logprobs(engine: Engine, prompts) -> torch.Tensor:
    """Of all tokens but the first of each."""
    found = []
    for prompt in prompts:
        request = engine.request(prompt, Sampling(max_tokens=0, prompt_logprobs=True), lambda events: None)
        engine.add(request)
        while engine.busy:
            engine.step()
        found += request.prompt_logprobs[1:]
    return torch.tensor(found)


@pytest.fixture
def prompts() -> list[list[int]]:
    rng = np.random.default_rng(0)
    return [[320, *rng.integers(0, 320, length).tolist()] for length in (4, 99, 29, 63, 64, 100)]


def test_an_engine_with_int8_is_near_the_one_without(prompts):
    """Log-probabilities of the order of 7 move by 0.05 on average from rounding to int8, 0.03 from bf16."""
    exact = prompt_logprobs(engine_of(torch.float32), prompts)
    bf16 = prompt_logprobs(engine_of(torch.bfloat16), prompts)
    for dtype, other in ((torch.float32, exact), (torch.bfloat16, bf16)):
        moved = prompt_logprobs(engine_of(dtype, weight_dtype="int8"), prompts) - other
        assert 0.01 < moved.abs().mean() < 0.1
        assert moved.abs().max() < 0.6
        assert moved.mean().abs() < 0.02


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_request_gives_the_same_tokens_alone_or_in_company(dtype, prompts):
    """With prompts computed whole and not kept: how attention cuts them up changes bits in bf16."""
    engine = engine_of(dtype, weight_dtype="int8")
    sampling = Sampling(temperature=1.3, top_k=200, seed=4, n=3, max_tokens=20)
    together = engine.generate(prompts, sampling)
    assert len({tuple(c.token_ids) for c in together}) == len(together)
    for number, prompt in enumerate(prompts):
        engine.scheduler.pool.forget_all()
        alone = engine.generate([prompt], sampling)
        assert [c.token_ids for c in alone] == [c.token_ids for c in together[3 * number : 3 * number + 3]]


def test_the_weights_that_were_rounded_are_let_go():
    module, layout = model_in(torch.bfloat16)
    matrices = [weakref.ref(p) for n, p in module.named_parameters() if p.dim() == 2 and "layers" in n]
    assert len(matrices) == 4 * SMALL.num_layers
    decoder = Decoder(module, layout, 4, SMALL.rotary_base, SMALL.seq_length, int8=True)
    del module
    gc.collect()
    assert not [matrix for matrix in matrices if matrix() is not None]
    held = [layer.qkv for layer in decoder.layers] + [layer.down for layer in decoder.layers]
    assert all(isinstance(linear, Int8Linear) and linear.weight.dtype == torch.int8 for linear in held)
