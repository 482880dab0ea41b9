"""FLOPs of training one token, forward and backward, in the two conventions that are in use.

Sources: Chowdhery et al., "PaLM" (2022), appendix B, for all of attention: 6 N + 12 L h s. Megatron-LM's
`num_floating_point_operations` counts the half of attention that the causal mask leaves: 6 N + 6 L h s.
Recomputation is counted in neither; `recomputed_flops` tells it.
"""

from dataclasses import dataclass

from megatron_codec.config import PretrainConfig
from megatron_codec.estimate.memory import layer_parameters
from megatron_codec.estimate.traffic import recomputed_layers


@dataclass(frozen=True)
class TokenFlops:
    """FLOPs a token, counting all of attention or its causal half."""

    full: float
    causal: float


def model_parameters(config: PretrainConfig, rows: int) -> int:
    """Parameters of the whole model, each counted once, with `rows` of the padded vocabulary."""
    model = config.model
    layer = sum(layer_parameters(config, tp=1))
    return model.num_layers * layer + model.hidden_size + 2 * rows * model.hidden_size


def token_flops(config: PretrainConfig, rows: int) -> TokenFlops:
    """For training at the model's whole context, with `rows` of the padded vocabulary."""
    model = config.model
    products = 6 * model_parameters(config, rows)
    attention = 12 * model.num_layers * model.hidden_size * model.seq_length
    return TokenFlops(full=products + attention, causal=products + attention / 2)


def recomputed_flops(config: PretrainConfig) -> float:
    """FLOPs a token that recomputation adds, counting all of attention; norms and SwiGLU count nothing."""
    model, training = config.model, config.training
    attention = 4 * model.hidden_size * model.seq_length  # of a layer, forward: scores, and what they weigh
    if training.recompute_granularity == "selective":
        mlp = 2 * 3 * model.hidden_size * model.ffn_hidden_size
        parts = {"core_attn": attention, "mlp": mlp, "layernorm": 0}
        return model.num_layers * sum(parts[part] for part in training.recompute_modules)
    matrices, _ = layer_parameters(config, tp=1)
    return recomputed_layers(config) * (2 * matrices + attention)
