"""The decoder against Hugging Face's Llama with the same weights, and its initial weights."""

import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

from megatron_codec.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.model import transformer_config
from megatron_codec.model.weights import named_parameters
from megatron_codec.presets import preset
from tests.llama import NUM_TOKENS, SMALL, hugging_face_names, hugging_face_twin, small_model


@pytest.fixture(scope="module")
def model():
    return small_model()[0]


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(0, NUM_TOKENS, (3, 97), generator=torch.Generator().manual_seed(0))


def logits_of(module, tokens):
    positions = torch.arange(tokens.shape[1]).expand_as(tokens)
    return module(tokens, positions, attention_mask=None)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    """Within 1e-5 of the largest value."""
    difference = (ours - theirs).abs().max() / theirs.abs().max()
    assert difference < 1e-5, f"{difference:.2e}"


@torch.no_grad()
def test_logits_are_those_of_hugging_face(model, tokens):
    twin = hugging_face_twin(model, SMALL)
    theirs = twin(tokens).logits
    assert theirs.std() > 0.5  # or the comparison would say little
    assert_close(logits_of(model, tokens), theirs)
    # What the comparison must be able to see: another rotary base, another epsilon.
    for other in (replace(SMALL, rotary_base=20000), replace(SMALL, norm_epsilon=1e-3)):
        with pytest.raises(AssertionError):
            assert_close(logits_of(model, tokens), hugging_face_twin(model, other)(tokens).logits)


def test_loss_and_gradients_are_those_of_hugging_face(tokens):
    model = small_model()[0]
    twin = hugging_face_twin(model, SMALL)
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    positions = torch.arange(inputs.shape[1]).expand_as(inputs)
    losses = model(inputs, positions, attention_mask=None, labels=labels)
    theirs = torch.nn.functional.cross_entropy(twin(inputs).logits.transpose(1, 2), labels, reduction="none")
    assert losses.shape == labels.shape
    assert_close(losses, theirs)
    losses.mean().backward()
    theirs.mean().backward()
    gradients = {name: parameter.grad for name, parameter in named_parameters(model)}
    ours = hugging_face_names(gradients, SMALL)
    expected = {name: parameter.grad for name, parameter in twin.named_parameters()}
    assert ours.keys() == expected.keys()
    for name in expected:
        assert_close(ours[name], expected[name])


@torch.no_grad()
def test_attention_is_causal(model, tokens):
    changed = tokens.clone()
    changed[:, 50:] = (changed[:, 50:] + 1) % NUM_TOKENS
    before, after = logits_of(model, tokens), logits_of(model, changed)
    assert torch.equal(before[:, :50], after[:, :50])
    assert not torch.isclose(before[:, 50:], after[:, 50:]).all(-1).any()


def test_the_embedding_is_padded_alike_under_every_layout():
    config = ModelConfig(make_vocab_size_divisible_by=128)
    assert [config.padded_vocab_size(n) for n in (1, 127, 128, 129, 322, 1026)] == [
        128, 128, 128, 256, 384, 1152,
    ]  # fmt: skip
    model = small_model()[0]
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert shapes["embedding.word_embeddings.weight"] == (384, 64)
    assert shapes["output_layer.weight"] == (384, 64)


def test_the_7b_preset_has_the_parameters_of_the_paper():
    """6.479 billion with this vocabulary: Llama-2 7B less its 32,000 rows of two embeddings."""

    def count(shape: ModelConfig) -> int:
        h, f, vocabulary = shape.hidden_size, shape.ffn_hidden_size, shape.padded_vocab_size(NUM_TOKENS)
        return shape.num_layers * (4 * h * h + 3 * h * f + 2 * h) + h + 2 * vocabulary * h

    assert count(preset("jpeglm-7b").model) == 6_479_417_344
    model = small_model()[0]
    assert sum(parameter.numel() for parameter in model.parameters()) == count(SMALL)


def test_initial_weights_are_normal():
    shape = replace(SMALL, init_method_std=0.02, hidden_size=128, ffn_hidden_size=256)
    for name, parameter in named_parameters(small_model(shape)[0]):
        if parameter.dim() == 1:
            assert (parameter == 1).all(), name
            continue
        output = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
        std = 0.02 / math.sqrt(2 * shape.num_layers) if output else 0.02
        assert stats.kstest(parameter.detach().flatten() / std, "norm").pvalue > 1e-4, name


def test_initial_weights_depend_on_seed_and_name_only():
    weights = dict(named_parameters(small_model(seed=1)[0]))
    again = dict(named_parameters(small_model(seed=1)[0]))
    deeper = dict(named_parameters(small_model(replace(SMALL, num_layers=4), seed=1)[0]))
    other = dict(named_parameters(small_model(seed=2)[0]))
    matrices = [name for name, parameter in weights.items() if parameter.dim() == 2]
    assert len(matrices) == 2 + 4 * SMALL.num_layers
    for name in matrices:
        assert torch.equal(weights[name], again[name])
        assert not torch.equal(weights[name], other[name])
        if "linear_proj" not in name and "linear_fc2" not in name:  # their scale depends on the depth
            assert torch.equal(weights[name], deeper[name])
    # No two matrices of one shape are alike.
    firsts = {parameter.flatten()[0].item() for name, parameter in weights.items() if name in matrices}
    assert len(firsts) == len(matrices)


def test_megatron_is_told_what_the_flags_say():
    _, layout = small_model()
    training = TrainingConfig(bf16=True, recompute_granularity="full")
    config = transformer_config(SMALL, ParallelConfig(), training, layout)
    assert config.params_dtype == config.pipeline_dtype == torch.bfloat16 and config.bf16
    assert (config.recompute_granularity, config.recompute_method, config.recompute_num_layers) == (
        "full", "uniform", 1,
    )  # fmt: skip
    assert config.kv_channels == SMALL.hidden_size // SMALL.num_attention_heads
    assert not config.add_bias_linear and config.gated_linear_unit
    assert config.hidden_dropout == config.attention_dropout == 0
