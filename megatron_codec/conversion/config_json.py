"""config.json of transformers' LlamaForCausalLM, and what of it has no place here."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_codec.config import ModelConfig, ParallelConfig
from megatron_codec.errors import UserError, collecting, raise_all
from megatron_codec.tokenizer import Tokenizer

CONFIG = "config.json"
# Fields with these values, or without one, say nothing that our model does not do.
_PLAIN = {
    "tie_word_embeddings": (False, "tied embeddings", "untie them first: copy the embedding to lm_head"),
    "attention_bias": (False, "biases in attention", "a plain Llama has none"),
    "mlp_bias": (False, "biases in the MLP", "a plain Llama has none"),
    "hidden_act": ("silu", "another activation", "a plain Llama has SwiGLU (silu)"),
    "quantization_config": (None, "quantized weights", "dequantize the model first"),
}


@dataclass(frozen=True)
class Shape:
    """What config.json says.

    Attributes:
        model: in our words.
        vocab_size: rows of embedding and output layer.
        key_value_heads: fewer than the heads where several query heads share one.
    """

    model: ModelConfig
    vocab_size: int
    key_value_heads: int


def read(folder: Path) -> Shape:
    """The shape of the Llama in a folder.

    Raises:
        UserError: no config.json, another architecture, or anything that our model does not do, all at once.
    """
    path = folder / CONFIG
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(fields, dict), "it is no object"
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(
            f"--load {folder}",
            f"has no readable {CONFIG} ({error})",
            "give a folder written by transformers' save_pretrained",
        ) from error
    architectures = fields.get("architectures") or ["LlamaForCausalLM"]
    if fields.get("model_type") != "llama" or architectures != ["LlamaForCausalLM"]:
        raise UserError(
            f"{path}: architecture {', '.join(architectures)} of model_type {fields.get('model_type')}",
            "must be LlamaForCausalLM of model_type llama",
            "other architectures have no place here",
        )
    faults = list(_unsupported(path, fields))
    shape = None
    with collecting(faults):
        shape = _shape(path, fields)
    raise_all(faults)
    assert shape is not None
    return shape


def _shape(path: Path, fields: dict[str, Any]) -> Shape:
    def number(name: str, default: Any = None, kind: type = int) -> Any:
        value = fields.get(name, default)
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not value > 0:
            raise UserError(f"{path}: {name} {value}", "must be a positive number", "copy the file again")
        return kind(value)

    rope = _rope(fields)
    theta = rope.get("rope_theta", fields.get("rope_theta", 10000.0))
    if not isinstance(theta, int | float) or theta != int(theta) or theta < 1:
        raise UserError(f"{path}: rope_theta {theta}", "must be a whole number", "no such base is supported")
    heads = number("num_attention_heads")
    context = number("max_position_embeddings")
    model = ModelConfig(
        num_layers=number("num_hidden_layers"),
        hidden_size=number("hidden_size"),
        ffn_hidden_size=number("intermediate_size"),
        num_attention_heads=heads,
        seq_length=context,
        max_position_embeddings=context,
        norm_epsilon=number("rms_norm_eps", 1e-6, float),
        rotary_base=int(theta),
        init_method_std=number("initializer_range", 0.02, float),
    )
    raise_all(list(model.faults(ParallelConfig())))
    width = model.hidden_size // heads
    if fields.get("head_dim") not in (None, width):
        raise UserError(
            f"{path}: head_dim {fields['head_dim']}",
            f"must be hidden_size / num_attention_heads = {width}",
            "heads of another width are not supported",
        )
    shared = number("num_key_value_heads", heads)
    if heads % shared:
        raise UserError(
            f"{path}: num_key_value_heads {shared}",
            f"must divide num_attention_heads {heads}",
            "copy the file again",
        )
    return Shape(model, number("vocab_size"), shared)


def _rope(fields: dict[str, Any]) -> dict[str, Any]:
    """What is said of rotary embedding beyond its base: `rope_parameters`, before transformers 5
    `rope_scaling`."""
    return fields.get("rope_parameters") or fields.get("rope_scaling") or {}


def _unsupported(path: Path, fields: dict[str, Any]) -> Iterator[UserError]:
    for name, (plain, what, remedy) in _PLAIN.items():
        value = fields.get(name, plain)
        if value not in (plain, None):
            shown = value if not isinstance(value, dict) else value.get("quant_method", "given")
            yield UserError(f"{path}: {name} {shown}", f"{what} are not supported", remedy)
    rope = _rope(fields)
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default" or rope.get("factor", 1.0) != 1.0:
        yield UserError(
            f"{path}: rope scaling of type {kind}",
            "is not supported: positions are rotated by their number alone",
            "convert the model as it was before its context was stretched",
        )
    partial = rope.get("partial_rotary_factor", fields.get("partial_rotary_factor", 1.0))
    if partial != 1.0:
        yield UserError(f"{path}: partial_rotary_factor {partial}", "must be 1", "no such model is supported")


def fields_of(model: ModelConfig, tokenizer: Tokenizer, dtype: str) -> dict[str, Any]:
    """config.json for our model, in the words of transformers 4 and 5 and of vLLM.

    Args:
        dtype: of the weights, `float32` or `bfloat16`.
    """
    theta = float(model.rotary_base)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": model.hidden_size,
        "intermediate_size": model.ffn_hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_attention_heads,
        "head_dim": model.hidden_size // model.num_attention_heads,
        "hidden_act": "silu",
        "max_position_embeddings": model.seq_length,
        "rms_norm_eps": model.norm_epsilon,
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "attention_bias": False,
        "mlp_bias": False,
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "vocab_size": tokenizer.num_tokens,
        "bos_token_id": tokenizer.bos,
        "eos_token_id": tokenizer.eos,
        "pad_token_id": None,
        "initializer_range": model.init_method_std,
        "use_cache": True,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
