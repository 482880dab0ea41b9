"""Layers against Megatron-Core's own, torch's own, and the formulas of their papers."""

import pytest
import torch
from torch.nn import functional as F

from megatron_codec import parallel  # before megatron.core: it prepares the platform
from megatron_codec.config import ParallelConfig
from megatron_codec.model.layers import RMSNorm, Rotary, Rotate, SdpaAttention, SwiGLU

# isort: split
from megatron.core.models.common.embeddings import RotaryEmbedding, apply_rotary_pos_emb
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

HEADS, WIDTH = 4, 16


def config_of(groups: int = HEADS, **options) -> TransformerConfig:
    heads, width = options.pop("num_heads", HEADS), options.pop("width", WIDTH)
    return TransformerConfig(
        num_layers=2,
        hidden_size=heads * width,
        num_attention_heads=heads,
        num_query_groups=groups,
        attention_dropout=options.pop("attention_dropout", 0.0),
        gated_linear_unit=True,
        masked_softmax_fusion=False,
        use_cpu_initialization=True,
        **options,
    )


def attention(core, config, **options):
    return core(
        config=config,
        layer_number=1,
        attn_mask_type=AttnMaskType.causal,
        attention_type=options.pop("attention_type", "self"),
        **options,
    )


@pytest.fixture(scope="module")
def layout():
    return parallel.initialize(ParallelConfig())


@pytest.fixture
def random():
    generator = torch.Generator().manual_seed(0)
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator, dtype=dtype)


def gradients(outputs: torch.Tensor, weights: torch.Tensor, *inputs: torch.Tensor):
    return torch.autograd.grad((outputs * weights).sum(), inputs)


@pytest.mark.parametrize("groups", [HEADS, 2, 1])
def test_attention_is_that_of_megatron(groups, layout, random):
    """With rotary embedding; forward and backward, grouped queries too."""
    s, b = 37, 3
    config = config_of(groups)
    query, key, value = random(s, b, HEADS, WIDTH), random(s, b, groups, WIDTH), random(s, b, groups, WIDTH)
    weights = random(s, b, HEADS * WIDTH)
    inputs = [x.requires_grad_() for x in (query, key, value)]

    rotary = Rotary(WIDTH, 10000)
    ours = attention(SdpaAttention, config, rotary=rotary)(query, key, value, None)

    frequencies = RotaryEmbedding(WIDTH, 1.0, use_cpu_initialization=True)(s)
    turned = [apply_rotary_pos_emb(x, frequencies, config) for x in (query, key)]
    theirs = attention(DotProductAttention, config, pg_collection=layout.groups)(*turned, value, None)

    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
    for mine, other in zip(
        gradients(ours, weights, *inputs), gradients(theirs, weights, *inputs), strict=True
    ):
        torch.testing.assert_close(mine, other, atol=2e-6, rtol=1e-5)


def test_attention_keeps_a_given_scale(layout, random):
    query, key, value = (random(9, 2, HEADS, WIDTH) for _ in range(3))
    rotary = Rotary(WIDTH, 10000)
    scaled = attention(SdpaAttention, config_of(), rotary=rotary, softmax_scale=0.5)(query, key, value, None)
    same = attention(SdpaAttention, config_of(), rotary=rotary)(query * 0.5 * WIDTH**0.5, key, value, None)
    torch.testing.assert_close(scaled, same)


def test_attention_refuses_what_it_would_ignore(layout, random):
    rotary = Rotary(WIDTH, 10000)
    with pytest.raises(ValueError, match=r"dropout=0\.1"):
        attention(SdpaAttention, config_of(attention_dropout=0.1), rotary=rotary)
    with pytest.raises(ValueError, match="attention_type='cross'"):
        attention(SdpaAttention, config_of(), rotary=rotary, attention_type="cross")
    module = attention(SdpaAttention, config_of(), rotary=rotary)
    query, key, value = (random(5, 1, HEADS, WIDTH) for _ in range(3))
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool)
    for refused in ({"attention_mask": mask}, {"attention_mask": None, "attention_bias": mask}):
        with pytest.raises(ValueError, match="no other mask"):
            module(query, key, value, **refused)


def test_rotary_tables_are_those_of_megatron():
    rotary = Rotary(WIDTH, 10000)
    for length in (7, 300, 20):  # they grow, and are cut
        cos, sin = rotary.tables(length, torch.device("cpu"))
        angles = RotaryEmbedding(WIDTH, 1.0, use_cpu_initialization=True)(length)[:, 0, 0, : WIDTH // 2]
        assert cos.shape == sin.shape == (length, WIDTH // 2)
        torch.testing.assert_close(cos, angles.cos())
        torch.testing.assert_close(sin, angles.sin())


def test_bf16_is_turned_by_the_angles_of_fp32_and_rounded_once(random):
    x = random(2, 300, WIDTH).bfloat16()
    cos, sin = Rotary(WIDTH, 10000).tables(300, x.device)
    exact = Rotate.apply(x.double(), cos.double(), sin.double())
    torch.testing.assert_close(Rotate.apply(x, cos, sin), exact.bfloat16(), rtol=0, atol=0)


def test_rotate_is_the_formula_and_its_gradient_the_turn_back(random):
    """RoFormer, equation 34, on halves: x cos + (-second, first) sin."""
    x = random(2, 3, 5, WIDTH, dtype=torch.float64)
    angles = random(5, WIDTH // 2, dtype=torch.float64)
    cos, sin = angles.cos(), angles.sin()
    first, second = x.chunk(2, -1)
    twice = [torch.cat([part, part], -1) for part in (cos, sin)]
    expected = x * twice[0] + torch.cat([-second, first], -1) * twice[1]
    torch.testing.assert_close(Rotate.apply(x, cos, sin), expected)
    # Per row, as the cache turns rows at different positions; and not contiguous, as attention gives it.
    rows = random(2, 1, 5, WIDTH // 2, dtype=torch.float64)
    turned = Rotate.apply(x.transpose(0, 2).contiguous().transpose(0, 2), rows.cos(), rows.sin())
    for row in range(2):
        torch.testing.assert_close(turned[row], Rotate.apply(x[row], rows[row].cos(), rows[row].sin()))
    assert torch.autograd.gradcheck(lambda x: Rotate.apply(x, cos, sin), x.requires_grad_())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_torch(dtype, random):
    module = RMSNorm(config_of(params_dtype=dtype), 48, eps=1e-5)
    module.weight.data = random(48).to(dtype)
    x = random(7, 3, 48).to(dtype).requires_grad_()
    with torch.no_grad():
        x[0, 0] = 0  # epsilon matters here
    ours = module(x)
    theirs = F.rms_norm(x, (48,), module.weight, 1e-5)
    assert ours.dtype == dtype
    exact = F.rms_norm(x.double(), (48,), module.weight.double(), 1e-5)
    weights = random(7, 3, 48).to(dtype)
    inputs = (x, module.weight)
    pairs = [
        (ours, theirs, exact),
        *zip(
            gradients(ours, weights, *inputs),
            gradients(theirs, weights, *inputs),
            gradients(exact, weights, *inputs),
            strict=True,
        ),
    ]
    for mine, other, true in pairs:
        if dtype == torch.float32:
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=1e-5)
        # Not further from fp64 than torch's own, but for the last place.
        true = true.double()
        allowed = (other - true).abs().max() * 1.5 + torch.finfo(dtype).eps * true.abs().max()
        assert (mine - true).abs().max() <= allowed


def test_rms_norm_gradient(random):
    module = RMSNorm(config_of(params_dtype=torch.float32), 8, eps=1e-2)
    x, weight = random(3, 2, 8).requires_grad_(), random(8)

    def by_hand(x, weight):
        return x / (x.square().mean(-1, keepdim=True) + 1e-2).sqrt() * weight

    module.weight.data = weight
    factor = random(3, 2, 8)
    ours = gradients(module(x), factor, x, module.weight)
    for mine, true in zip(ours, gradients(by_hand(x, module.weight), factor, x, module.weight), strict=True):
        torch.testing.assert_close(mine, true, atol=1e-6, rtol=1e-5)


def test_rms_norm_is_marked_for_sequence_parallelism():
    for marked in (False, True):
        options = {"sequence_parallel": marked, "tensor_model_parallel_size": 2}
        assert RMSNorm(config_of(**options), 8).weight.sequence_parallel is marked


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_swiglu_is_the_formula(dtype, random):
    """Shazeer 2020, equation 6 without the matrices."""
    x = random(5, 2, 24).to(dtype).requires_grad_()
    gate, up = x.chunk(2, -1)
    expected = F.silu(gate) * up
    ours = SwiGLU(config_of())(x)
    tolerance = {} if dtype == torch.float32 else {"atol": 2e-2, "rtol": 1.6e-2}
    torch.testing.assert_close(ours, expected, **tolerance)
    weights = random(5, 2, 12).to(dtype)
    torch.testing.assert_close(gradients(ours, weights, x), gradients(expected, weights, x), **tolerance)
