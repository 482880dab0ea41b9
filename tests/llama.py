"""A small model in this process, and its twin in Hugging Face's implementation."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_codec import parallel
from megatron_codec.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.model import build_model, initialize_weights, transformer_config
from megatron_codec.model.weights import named_parameters

NUM_TOKENS = 322
# Initial weights ten times the usual ones, so that attention is far from uniform and logits are of order 1.
SMALL = ModelConfig(
    num_layers=3,
    hidden_size=64,
    ffn_hidden_size=160,
    num_attention_heads=4,
    seq_length=128,
    init_method_std=0.2,
)


def small_model(model: ModelConfig = SMALL, seed: int = 1, core_attention: type | None = None):
    """(module, layout): a fresh model of one process in fp32."""
    parallelism = ParallelConfig()
    layout = parallel.initialize(parallelism)
    config = transformer_config(model, parallelism, TrainingConfig(), layout)
    module = build_model(config, model, NUM_TOKENS, layout, core_attention=core_attention)
    initialize_weights(module, model, layout, seed)
    return module, layout


def hugging_face_config(model: ModelConfig) -> LlamaConfig:
    """The same shape in Hugging Face's words."""
    return LlamaConfig(
        vocab_size=model.padded_vocab_size(NUM_TOKENS),
        hidden_size=model.hidden_size,
        intermediate_size=model.ffn_hidden_size,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.num_attention_heads,
        max_position_embeddings=model.seq_length,
        rms_norm_eps=model.norm_epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": float(model.rotary_base)},
        tie_word_embeddings=False,
        attention_bias=False,
        mlp_bias=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )


def hugging_face_twin(module, model: ModelConfig) -> LlamaForCausalLM:
    """Hugging Face's Llama in fp32 with the weights of `module`, on its device."""
    with next(module.parameters()).device:
        twin = LlamaForCausalLM(hugging_face_config(model)).eval()
    weights = {name: parameter.detach() for name, parameter in named_parameters(module)}
    twin.load_state_dict(hugging_face_names(weights, model), strict=True)
    return twin


def hugging_face_names(tensors: dict[str, torch.Tensor], model: ModelConfig) -> dict[str, torch.Tensor]:
    """Weights, or their gradients, under Hugging Face's names and in its shapes.

    Megatron's query-key-value matrix holds [q; k; v] of one head after the other, its first MLP matrix
    [gate; up].
    """
    renamed = {}
    for name, tensor in tensors.items():
        prefix, _, rest = name.partition("decoder.layers.")
        if prefix or not rest:
            renamed[_OUTSIDE[name]] = tensor
            continue
        number, _, part = rest.partition(".")
        layer = f"model.layers.{number}."
        if part == "self_attention.linear_qkv.weight":
            heads = tensor.view(model.num_attention_heads, 3, -1, model.hidden_size)
            for index, letter in enumerate("qkv"):
                renamed[f"{layer}self_attn.{letter}_proj.weight"] = heads[:, index].flatten(0, 1)
        elif part == "mlp.linear_fc1.weight":
            renamed[f"{layer}mlp.gate_proj.weight"], renamed[f"{layer}mlp.up_proj.weight"] = tensor.chunk(2)
        else:
            renamed[layer + _INSIDE[part]] = tensor
    return renamed


_OUTSIDE = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_INSIDE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
