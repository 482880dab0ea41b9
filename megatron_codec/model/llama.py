"""Llama-2 on Megatron-Core's GPTModel: RMSNorm, RoPE, SwiGLU, no bias, untied embeddings.

Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models" (2023), section 2.2.
"""

# Megatron-Core's annotations are narrower than what its own specs put there.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import torch
from megatron.core.fp8_utils import is_first_last_bf16_layer
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    TransformerLayer,
    TransformerLayerSubmodules,
    get_transformer_layer_offset,
)
from torch import Tensor
from torch.nn import functional as F

from megatron_codec import platform
from megatron_codec.config import Fp8Config, ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.model.fp8 import emulated_linears
from megatron_codec.model.layers import RMSNorm, Rotary, SdpaAttention, SwiGLU
from megatron_codec.model.products import plain_linears
from megatron_codec.parallel import Layout


def transformer_config(
    model: ModelConfig,
    parallel: ParallelConfig,
    training: TrainingConfig,
    layout: Layout,
    fp8: Fp8Config | None = None,
) -> TransformerConfig:
    """Our configuration in Megatron-Core's words."""
    fp8 = fp8 or Fp8Config()
    cuda = layout.device.type == "cuda"
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    full = training.recompute_granularity == "full"
    fused = platform.prepare().transformer_engine and not fp8.fp8_emulation
    if not platform.prepare().transformer_engine:
        platform.mend_recomputation()
    return TransformerConfig(
        num_layers=model.num_layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.num_attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        virtual_pipeline_model_parallel_size=layout.vp if layout.vp > 1 else None,
        context_parallel_size=layout.cp,
        cp_comm_type=parallel.cp_comm_type if layout.cp > 1 else None,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=training.bf16,
        use_cpu_initialization=not cuda,
        # Megatron's fused kernels are compiled at run time by Triton or come with Transformer Engine.
        bias_activation_fusion=cuda,
        # The flag by which an MLP takes the activation of its spec, here our own.
        use_te_activation_func=not cuda and not fused,
        bias_dropout_fusion=cuda,
        apply_rope_fusion=cuda and fused,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        # Of an emulation Megatron-Core knows nothing but which layers it leaves out.
        fp8=None if fp8.fp8_emulation else fp8.fp8_format,
        fp8_recipe=fp8.fp8_recipe,
        fp8_margin=fp8.fp8_margin,
        fp8_amax_history_len=fp8.fp8_amax_history_len,
        fp8_amax_compute_algo=fp8.fp8_amax_compute_algo,
        fp8_wgrad=fp8.fp8_wgrad,
        first_last_layers_bf16=fp8.first_last_layers_bf16,
        num_layers_at_start_in_bf16=fp8.num_layers_at_start_in_bf16,
        num_layers_at_end_in_bf16=fp8.num_layers_at_end_in_bf16,
        recompute_granularity=training.recompute_granularity,
        recompute_method=(training.recompute_method or "uniform") if full else None,
        recompute_num_layers=(training.recompute_num_layers or 1) if full else None,
        recompute_modules=list(training.recompute_modules),
        # gloo pairs batched messages with one peer in any order, so they are sent one by one on a CPU. With
        # two interleaved stages both neighbours are one peer, and NCCL has that danger too.
        batch_p2p_comm=cuda and layout.vp == 1,
        overlap_p2p_comm=layout.vp > 1,
        # Interleaved stages send while they compute: gloo still reads what CUDA's streams keep alive.
        deallocate_pipeline_outputs=cuda or layout.vp == 1,
    )


class Llama(GPTModel):
    """GPTModel with torch's cross-entropy where the vocabulary is not cut: one kernel instead of ten."""

    def __init__(self, config: TransformerConfig, **rest):
        super().__init__(config=config, **rest)
        if self.post_process:
            # Megatron-Core makes this one without asking a spec. The other class has no state of its own.
            self.output_layer.__class__ = plain_linears(config.bf16)[0]

    def compute_language_model_loss(self, labels: Tensor, logits: Tensor) -> Tensor:
        """Nats of every token, fp32 [b, s], from `labels` [b, s] and `logits` [s, b, v / TP]."""
        if self.config.tensor_model_parallel_size > 1:
            return super().compute_language_model_loss(labels, logits)
        targets = labels.transpose(0, 1)
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
        return losses.view_as(targets).transpose(0, 1)


def build_model(
    config: TransformerConfig,
    model: ModelConfig,
    num_tokens: int,
    layout: Layout,
    core_attention: type | None = None,
    chunk: int = 0,
    fp8: Fp8Config | None = None,
) -> "Llama":
    """One of the pieces of the decoder that this process holds, with weights not yet set.

    Args:
        num_tokens: ids of the tokenizer, BOS and EOS included; the embedding is padded from it.
        chunk: which piece; there are `layout.vp`, and one unless pipeline stages are interleaved.
        core_attention: stands in for the attention of training: the engine's attention with its cache.
            Like `SdpaAttention` it is given the `Rotary` and applies it.
        fp8: emulated where it says so; Transformer Engine's is in `config`.
    """
    emulation = fp8 if fp8 and fp8.fp8_format and fp8.fp8_emulation else None
    fused = platform.prepare().transformer_engine and emulation is None
    if core_attention is None and not fused:
        core_attention = SdpaAttention
    vp_stage = chunk if layout.vp > 1 else None
    if fused:
        layers = [get_gpt_layer_with_transformer_engine_spec()]
        spec = layers[0]
    else:
        # Given a bare layer spec, Megatron-Core would choose the final norm by itself.
        first = get_transformer_layer_offset(config, vp_stage)
        numbers = range(first, first + config.num_layers // (layout.pp * layout.vp))
        layers = [
            _plain_layer(config.bf16, None if is_first_last_bf16_layer(config, number) else emulation)
            for number in numbers
        ]
        spec = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    if core_attention is not None:
        attention = ModuleSpec(
            module=core_attention, params={"rotary": Rotary(config.kv_channels, model.rotary_base)}
        )
        for layer in layers:
            layer.submodules.self_attention.submodules.core_attention = attention
    return Llama(
        config=config,
        transformer_layer_spec=spec,
        vocab_size=model.padded_vocab_size(num_tokens),
        max_sequence_length=model.seq_length,
        pre_process=layout.has_embedding(chunk),
        post_process=layout.has_output(chunk),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope" if core_attention is None else "none",
        rotary_base=model.rotary_base,
        pg_collection=layout.groups,
        vp_stage=vp_stage,
    )


def _plain_layer(bf16: bool, emulation: Fp8Config | None) -> ModuleSpec:
    """A layer of Megatron-Core's own modules and ours, for where Transformer Engine is not installed."""
    kinds = emulated_linears(emulation) if emulation else ((kind, {}) for kind in plain_linears(bf16))
    by_rows, by_columns = (ModuleSpec(kind, params=params) for kind, params in kinds)
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=by_rows,
                    core_attention=SdpaAttention,
                    linear_proj=by_columns,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=by_rows, linear_fc2=by_columns, activation_func=SwiGLU),
            ),
            mlp_bda=get_bias_dropout_add,
            # The names that the checkpoint has under Transformer Engine, so that both read each other's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )
