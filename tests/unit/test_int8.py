"""Weights in int8: the rounding, and an engine beside one in bf16. The products: test_packed_linear.py."""

import gc
import weakref

import numpy as np
import pytest
import torch

from megatron_codec import _csrc
from megatron_codec.inference import Engine
from megatron_codec.inference.config import EngineConfig
from megatron_codec.inference.decoder import Decoder
from megatron_codec.inference.linear import quantize
from megatron_codec.inference.packed import PackedLinear
from megatron_codec.tokenizer import Tokenizer
from tests.llama import SMALL, small_model
from tests.tiny import CODEC
from tests.unconstrained import Sampling


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_rounding_is_within_half_a_step(dtype):
    magnitudes = torch.randn(200, 1).exp()
    weight = (torch.randn(200, 96) * magnitudes * 0.02).to(dtype)
    weight[3] = 0
    weight[4] *= 1e-30
    q, scales = quantize(weight)
    assert q.dtype == torch.int8 and scales.dtype == torch.float32 and scales.shape == (200,)
    error = (q.double() * scales.double()[:, None] - weight.double()).abs().amax(1)
    assert (error <= scales.double() * (0.5 + 1e-4)).all()
    assert not q[3].any() and (q.abs().amax(1)[scales > 0] == 127).all()


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


@pytest.mark.skipif(not _csrc.has_amx(), reason="without AMX bf16 weights stay where they are")
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_the_weights_that_were_packed_are_let_go(int8):
    module, layout = model_in(torch.bfloat16)
    matrices = [weakref.ref(p) for n, p in module.named_parameters() if p.dim() == 2 and "layers" in n]
    assert len(matrices) == 4 * SMALL.num_layers
    decoder = Decoder(module, layout, 4, SMALL.rotary_base, SMALL.seq_length, int8=int8)
    del module
    gc.collect()
    assert not [matrix for matrix in matrices if matrix() is not None]
    assert all(isinstance(layer.qkv, PackedLinear) for layer in decoder.layers)


@pytest.mark.skipif(not _csrc.has_amx(), reason="without AMX bf16 weights stay where they are")
@pytest.mark.parametrize("int8", [False, True], ids=["bf16", "int8"])
def test_weights_are_let_go_as_they_are_packed(int8):
    """So that a model takes its own memory once; and not where somebody else trains it."""
    for frees in (False, True):
        module, layout = model_in(torch.bfloat16)
        before = sum(p.numel() for p in module.parameters())
        Decoder(module, layout, 4, SMALL.rotary_base, SMALL.seq_length, int8=int8, frees=frees)
        left = {name for name, p in module.named_parameters() if p.numel()}
        matrices = {name for name, _ in module.named_parameters() if ".linear_" in name}
        assert sum(p.numel() for p in module.parameters()) == before or frees
        assert bool(matrices & left) != frees and "embedding.word_embeddings.weight" in left
