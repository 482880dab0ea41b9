"""bf16 where the processor cannot multiply it: products from fp32 copies against fp64 and torch's own."""

import pytest
import torch

from megatron_codec import parallel  # before megatron.core: it prepares the platform
from megatron_codec.config import Fp8Config, ParallelConfig, TrainingConfig
from megatron_codec.inference.linear import make_linear
from megatron_codec.model import build_model, initialize_weights, kernels, products, transformer_config
from tests.llama import NUM_TOKENS, SMALL

# isort: split
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear

EMULATED = Fp8Config(fp8_format="hybrid", fp8_emulation=True, fp8_recipe="tensorwise")


@pytest.fixture(params=[False, True], ids=["can multiply", "cannot"])
def lacks(request, monkeypatch) -> bool:
    """Both kinds of processor, without the kernels for AMX."""
    monkeypatch.setattr(products, "processor_lacks_bf16", lambda: request.param)
    monkeypatch.setattr(kernels, "fits", lambda x, width: False)
    return request.param


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def distance(x, true) -> float:
    return float((x.double() - true.double()).norm() / true.double().norm())


def test_a_product_is_as_near_as_bf16_can_be(lacks):
    a, b = random(5, 7, 96), random(96, 33, seed=1)
    found, true = products.multiply(a, b), a.double() @ b.double()
    assert found.dtype == torch.bfloat16
    assert distance(found, true) <= 1.01 * distance(true.bfloat16(), true)
    exact = products.multiply(a.double(), b.double())
    assert exact.dtype == torch.float64 and torch.equal(exact, true)


def test_attention_is_of_its_inputs_type(lacks):
    q, k, v = (random(2, 3, 20, 16, seed=seed) for seed in range(3))
    found = products.attention(q, k, v, is_causal=True, scale=0.3)
    true = products.attention(q.double(), k.double(), v.double(), is_causal=True, scale=0.3)
    assert found.dtype == torch.bfloat16 and true.dtype == torch.float64
    assert distance(found, true) < 4e-3


@pytest.mark.parametrize("shape", [(64, 96), (20, 33)])
def test_the_engines_products(lacks, shape, monkeypatch):
    monkeypatch.setattr("megatron_codec.inference.linear._has_packing", lambda: False)
    weight = random(*shape)
    for int8 in (False, True):
        linear = make_linear(weight, int8)
        for rows in (0, 1, 8, 9, 40):
            x = random(rows, shape[1], seed=2)
            found = linear(x)
            assert found.dtype == torch.bfloat16 and found.shape == (rows, shape[0])
            if rows:
                assert distance(found, x.double() @ weight.double().T) < (2e-2 if int8 else 4e-3)


def model_of(fp8: Fp8Config | None = None):
    parallelism = ParallelConfig()
    layout = parallel.initialize(parallelism)
    config = transformer_config(SMALL, parallelism, TrainingConfig(bf16=True), layout, fp8)
    module = build_model(config, SMALL, NUM_TOKENS, layout, fp8=fp8).bfloat16()
    initialize_weights(module, SMALL, layout, 1)
    return module


def loss_and_gradients(module):
    ids = torch.randint(NUM_TOKENS, (2, 41), generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)[None].expand(2, -1)
    loss = module(ids[:, :-1], positions, None, labels=ids[:, 1:]).mean()
    loss.backward()
    return loss, {name: parameter.grad for name, parameter in module.named_parameters()}


@pytest.mark.parametrize("fp8", [None, EMULATED], ids=["bf16", "emulated FP8"])
def test_both_processors_train_alike(monkeypatch, fp8):
    monkeypatch.setattr(kernels, "fits", lambda x, width: False)
    found = []
    for lacks in (False, True):
        monkeypatch.setattr(products, "processor_lacks_bf16", lambda lacks=lacks: lacks)
        module = model_of(fp8)
        if fp8 is None:
            linears = {type(m) for m in module.modules() if isinstance(m, ColumnParallelLinear)}
            rows = {type(m) for m in module.modules() if isinstance(m, RowParallelLinear)}
            assert linears == {products.CopyingColumnParallelLinear if lacks else ColumnParallelLinear}
            assert rows == {products.CopyingRowParallelLinear if lacks else RowParallelLinear}
        found.append(loss_and_gradients(module))
    (loss, gradients), (other_loss, other_gradients) = found
    assert loss.item() == pytest.approx(other_loss.item(), rel=5e-3)
    assert gradients.keys() == other_gradients.keys()
    for name, gradient in gradients.items():
        assert gradient.dtype == torch.bfloat16 and gradient.norm() > 0
        # Under FP8 a number that falls between two others may go either way, and takes others with it.
        assert distance(other_gradients[name], gradient) < (0.05 if fp8 is None else 0.3), name


def test_fp32_and_gpus_are_left_alone(monkeypatch):
    monkeypatch.setattr(products, "processor_lacks_bf16", lambda: True)
    assert products.plain_linears(bf16=False) == (ColumnParallelLinear, RowParallelLinear)
    assert products.plain_linears(bf16=True)[0] is products.CopyingColumnParallelLinear
    assert not products.needs_copies(torch.zeros(1)) and products.needs_copies(random(1))
    assert not products.needs_copies(torch.empty(1, dtype=torch.bfloat16, device="meta"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert products.plain_linears(bf16=True) == (ColumnParallelLinear, RowParallelLinear)
