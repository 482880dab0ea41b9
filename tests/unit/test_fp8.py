"""Emulated FP8: rounding, scales and products against the formats and Transformer Engine's own functions."""

import dataclasses
import math
from collections import deque
from types import SimpleNamespace

import pytest
import torch

from megatron_codec import parallel  # before megatron.core: it prepares the platform
from megatron_codec.config import Fp8Config, ParallelConfig, TrainingConfig
from megatron_codec.model import build_model, initialize_weights, transformer_config
from megatron_codec.model.fp8 import E4M3, E5M2, DelayedScales, PerTensor, quantizer, round_to
from tests.llama import NUM_TOKENS, SMALL
from tests.te_source import published

FORMATS = [E4M3, E5M2]


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """All finite values of a format, ascending, with the code of each."""
    codes = torch.arange(256, dtype=torch.uint8)
    values = codes.view(dtype).float()
    finite = values.isfinite() & ~((values == 0) & (codes > 127))
    return values[finite].sort().values


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("dtype", "most", "least"), [(E4M3, 448, 2**-9), (E5M2, 57344, 2**-16)])
def test_rounds_to_the_nearest_value_of_the_format(dtype, most, least):
    """Micikevicius et al. 2022, table 1; the nearest is searched among all values."""
    values = values_of(dtype)
    assert values.max() == most and values[values > 0].min() == least
    x = torch.cat([random(4000) * 2.0 ** torch.arange(-20, 20).repeat(100), values])
    x = x[x.abs() <= most]
    distance = (x[:, None].double() - values.double()).abs()
    assert torch.equal((round_to(x, dtype).double() - x.double()).abs(), distance.min(dim=1).values)
    assert round_to(torch.tensor([1e9, -math.inf]), dtype).tolist() == [most, -most]


@pytest.mark.parametrize("dtype", FORMATS)
def test_ties_go_to_the_even_value(dtype):
    values = values_of(dtype)
    middles = (values[1:].double() + values[:-1].double()) / 2
    rounded = round_to(middles.float(), dtype)
    # Of two neighbours the codes differ by one; the even code has an even last bit.
    codes = rounded.to(dtype).view(torch.uint8)
    assert torch.equal(middles.float().double(), middles) and (codes % 2 == 0).all()


def test_delayed_scales_are_those_of_transformer_engine():
    """Their update of history and scale, taken from the published source, step by step."""
    theirs = published("transformer_engine/pytorch/quantization.py")
    settings = [("max", 4, 0), ("most_recent", 4, 1), ("max", 1, 0), ("most_recent", 1, 2)]
    for algorithm, length, margin in settings:
        config = Fp8Config(
            "hybrid",
            fp8_margin=margin,
            fp8_amax_history_len=length,
            fp8_amax_compute_algo=algorithm,  # type: ignore[arg-type]
        )
        recipe = SimpleNamespace(amax_compute_algo=algorithm, margin=margin, scaling_factor_compute_algo=None)
        ours = PerTensor(config, E4M3)
        history, scale = torch.zeros(length, 1), torch.ones(1)
        # Zeros, infinities and values whose scale is no fp32 number keep or bound the scale.
        for amax in (3.0, 0.5, 0.0, 7.0, 0.01, math.inf, 0.01, 1e-45, 0.0, 0.0, 0.0, 0.0, 0.0, 2.0):
            ours.observe(torch.tensor([-amax / 2, amax if amax < math.inf else 1.0]))
            ours.update(torch.tensor(amax))
            history[0] = amax
            theirs["_amax_and_scale_update"](history, scale, 448.0, recipe)
            assert ours.scale == scale and ours.history.tolist() == history[:, 0].tolist()


def test_delayed_scaling_uses_the_scale_of_earlier_steps():
    rounder = PerTensor(Fp8Config("hybrid"), E4M3)
    x = random(5, 8) * 1e-3
    assert torch.equal(rounder.rows(x), round_to(x, E4M3))  # at first the scale is 1
    rounder.observe(x)
    rounder.observe(x / 2)
    rounder.update(rounder.history[0].clone())
    scale = 448 / x.abs().max()
    assert torch.equal(rounder.rows(x), round_to(x * scale, E4M3) / scale)
    assert (rounder.rows(x) - x).abs().max() < x.abs().max() * 2**-4


def test_tensorwise_brings_the_largest_value_to_the_largest_of_the_format():
    rounder = quantizer(Fp8Config("hybrid", fp8_recipe="tensorwise"), "gradient")
    x = random(6, 7) * 1e-8
    scale = 57344 / x.abs().max()
    assert torch.equal(rounder.rows(x), round_to(x * scale, E5M2) / scale)
    assert torch.equal(rounder.rows(torch.zeros(2, 2)), torch.zeros(2, 2))


@pytest.mark.parametrize(
    ("recipe", "operand", "across", "along"),
    [
        ("blockwise", "input", 1, 128),
        ("blockwise", "weight", 128, 128),
        ("blockwise", "gradient", 1, 128),
        ("mxfp8", "input", 1, 32),
        ("mxfp8", "weight", 1, 32),
    ],
)
def test_blocks_are_scaled_one_by_one(recipe, operand, across, along):
    """Against a loop over blocks; the scale is the largest power of two that keeps a block in range."""
    rounder = quantizer(Fp8Config("e4m3", fp8_recipe=recipe), operand)
    x = random(200, 300) * 2.0 ** random(200, 300, seed=1).mul(8).round()
    x[:across, :along] = 0

    def by_hand(x, across, along):
        result = torch.empty_like(x)
        for i in range(0, len(x), across):
            for j in range(0, x.shape[1], along):
                block = x[i : i + across, j : j + along]
                amax = block.abs().max().item()
                scale = 2.0 ** math.floor(math.log2(448 / amax)) if amax else 1.0
                result[i : i + across, j : j + along] = round_to(block * scale, E4M3) / scale
        return result

    assert torch.equal(rounder.rows(x), by_hand(x, across, along))
    assert torch.equal(rounder.columns(x), by_hand(x.T, across, along).T)


def emulated(recipe: Fp8Config, training: TrainingConfig | None = None):
    layout = parallel.initialize(ParallelConfig())
    config = transformer_config(SMALL, ParallelConfig(), training or TrainingConfig(), layout, recipe)
    module = build_model(config, SMALL, NUM_TOKENS, layout, fp8=recipe)
    initialize_weights(module, SMALL, layout, seed=1)
    return module, layout


@pytest.mark.parametrize(
    ("recipe", "wgrad"),
    [("delayed", True), ("delayed", False), ("tensorwise", True), ("blockwise", True), ("mxfp8", True)],
)
def test_all_three_products_of_a_layer_take_rounded_operands(recipe, wgrad):
    """Y = X W^T, dX = dY W and dW = dY^T X, each from the formulas."""
    config = Fp8Config("hybrid", fp8_recipe=recipe, fp8_wgrad=wgrad, fp8_emulation=True)
    module, _ = emulated(config)
    layer = module.decoder.layers[0].mlp.linear_fc1
    x = random(6, 2, SMALL.hidden_size).requires_grad_()
    y, bias = layer(x)
    upstream = random(*y.shape, seed=2) * 1e-3
    to_x, to_weight = torch.autograd.grad(y, (x, layer.weight), upstream)

    fresh = {operand: quantizer(config, operand) for operand in ("input", "weight", "gradient")}
    flat, gradient = x.detach().flatten(0, 1), upstream.flatten(0, 1)
    weight = layer.weight.detach()
    by_input, by_weight, by_gradient = fresh.values()
    assert bias is None
    torch.testing.assert_close(y.flatten(0, 1), by_input.rows(flat) @ by_weight.rows(weight).T)
    torch.testing.assert_close(to_x.flatten(0, 1), by_gradient.rows(gradient) @ by_weight.columns(weight))
    exact = gradient.T @ flat
    rounded = by_gradient.columns(gradient).T @ by_input.columns(flat)
    torch.testing.assert_close(to_weight, rounded if wgrad else exact)
    assert not torch.equal(rounded, exact) and not torch.equal(y.flatten(0, 1), flat @ weight.T)


def test_evaluation_does_not_move_the_scales():
    module, layout = emulated(Fp8Config("hybrid", fp8_emulation=True))
    tokens = torch.arange(2 * SMALL.seq_length).view(2, -1) % NUM_TOKENS
    scales = DelayedScales([module], layout)
    assert len(scales.scales) == 3 * 4 * SMALL.num_layers  # operands, matrices, layers
    with torch.no_grad():
        module.eval()(tokens, None, None)
        assert not any(scale.history.any() for scale in scales.scales.values())
        module.train()(tokens, None, None)
    seen = {name.rpartition(".")[2] for name, scale in scales.scales.items() if scale.history.any()}
    assert seen == {"fp8_input", "fp8_weight"}


def test_first_and_last_layers_stay_as_they_are():
    config = Fp8Config(
        "hybrid", fp8_recipe="tensorwise", fp8_emulation=True, first_last_layers_bf16=True,
        num_layers_at_end_in_bf16=1,
    )  # fmt: skip
    module, _ = emulated(config)
    kinds = [type(layer.mlp.linear_fc1).__name__ for layer in module.decoder.layers]
    assert kinds == ["ColumnParallelLinear", "Fp8ColumnParallelLinear", "ColumnParallelLinear"]


def test_the_config_is_that_of_megatron_core():
    """Every FP8 field arrives in Megatron-Core's own TransformerConfig, which checks them itself."""
    layout = parallel.initialize(ParallelConfig())
    config = Fp8Config(
        "hybrid",
        "delayed",
        fp8_margin=1,
        fp8_amax_history_len=1024,
        fp8_amax_compute_algo="max",
        fp8_wgrad=False,
    )
    training = TrainingConfig(bf16=True)
    found = transformer_config(SMALL, ParallelConfig(), training, layout, config)
    assert found.fp8 == "hybrid"
    for name, value in dataclasses.asdict(config).items():
        if name != "fp8_format" and "emulation" not in name:
            assert getattr(found, name) == value, name
    emulation = dataclasses.replace(config, fp8_emulation=True)
    assert transformer_config(SMALL, ParallelConfig(), training, layout, emulation).fp8 is None
    # What we refuse, it refuses.
    wrong = dataclasses.replace(config, first_last_layers_bf16=True)
    with pytest.raises(ValueError, match="Delayed scaling does not support first / last layer"):
        transformer_config(SMALL, ParallelConfig(), training, layout, wrong)
    assert deque(wrong.faults(SMALL, ParallelConfig(), training))
