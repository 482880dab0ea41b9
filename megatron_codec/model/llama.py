"""Llama-2 on Megatron-Core's GPTModel: RMSNorm, RoPE, SwiGLU, no bias, untied embeddings.

Touvron et al., "Llama 2: Open Foundation and Fine-Tuned Chat Models" (2023), section 2.2.

Initial weights depend on the seed and the parameter's name only: each whole matrix is drawn from a
generator of its own and cut for this process, so every TP x PP x DP layout starts from the same model.
"""

# Megatron-Core's annotations are narrower than what its own specs put there.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor
from torch.nn import functional as F

from megatron_codec import platform
from megatron_codec.config import ModelConfig, ParallelConfig, TrainingConfig
from megatron_codec.model.layers import RMSNorm, Rotary, SdpaAttention, SwiGLU
from megatron_codec.parallel import Layout


def transformer_config(
    model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig, layout: Layout
) -> TransformerConfig:
    """Our configuration in Megatron-Core's words."""
    cuda = layout.device.type == "cuda"
    dtype = torch.bfloat16 if training.bf16 else torch.float32
    full = training.recompute_granularity == "full"
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
        use_te_activation_func=not cuda,
        bias_dropout_fusion=cuda,
        apply_rope_fusion=cuda and platform.prepare().transformer_engine,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
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
) -> "Llama":
    """One of the pieces of the decoder that this process holds, with weights not yet set.

    Args:
        num_tokens: ids of the tokenizer, BOS and EOS included; the embedding is padded from it.
        chunk: which piece; there are `layout.vp`, and one unless pipeline stages are interleaved.
        core_attention: stands in for the attention of training: the engine's attention with its cache.
            Like `SdpaAttention` it is given the `Rotary` and applies it.
    """
    fused = platform.prepare().transformer_engine
    if core_attention is None and not fused:
        core_attention = SdpaAttention
    layer = get_gpt_layer_with_transformer_engine_spec() if fused else _plain_layer()
    if core_attention is not None:
        layer.submodules.self_attention.submodules.core_attention = ModuleSpec(
            module=core_attention, params={"rotary": Rotary(config.kv_channels, model.rotary_base)}
        )
    if not fused:
        # Given a bare layer spec, Megatron-Core would choose the final norm by itself.
        layers = [layer] * (config.num_layers // (layout.pp * layout.vp))
        layer = TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)
    return Llama(
        config=config,
        transformer_layer_spec=layer,
        vocab_size=model.padded_vocab_size(num_tokens),
        max_sequence_length=model.seq_length,
        pre_process=layout.has_embedding(chunk),
        post_process=layout.has_output(chunk),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope" if core_attention is None else "none",
        rotary_base=model.rotary_base,
        pg_collection=layout.groups,
        vp_stage=chunk if layout.vp > 1 else None,
    )


def _plain_layer() -> ModuleSpec:
    """A layer of Megatron-Core's own modules and ours, for where Transformer Engine is not installed."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=SdpaAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(
                    linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear, activation_func=SwiGLU
                ),
            ),
            mlp_bda=get_bias_dropout_add,
            # The names that the checkpoint has under Transformer Engine, so that both read each other's.
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


@torch.no_grad()
def initialize_weights(module: GPTModel, model: ModelConfig, layout: Layout, seed: int) -> None:
    """Sets this process's cut of the initial weights: normal for matrices, one for norms."""
    output_std = model.init_method_std / math.sqrt(2 * model.num_layers)
    for name, parameter in named_parameters(module):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = (
            output_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            else model.init_method_std
        )
        dim = getattr(parameter, "partition_dim", -1)
        cut = dim >= 0 and layout.tp > 1
        shape = list(parameter.shape)
        if cut:
            shape[dim] *= layout.tp
        generator = torch.Generator(device=parameter.device).manual_seed(_seed_of(seed, name))
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        whole.normal_(0.0, std, generator=generator)
        if cut:
            # A SwiGLU matrix is [gate; up]: each rank holds its part of both (stride 2).
            stride = 2 if name.endswith("linear_fc1.weight") else 1
            pieces = whole.chunk(stride, dim)
            whole = torch.cat([piece.chunk(layout.tp, dim)[layout.tp_rank] for piece in pieces], dim)
        parameter.copy_(whole)


def named_parameters(module: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (name, parameter) with the layer's number in the whole model, whatever stage holds it."""
    offset = int(module.decoder.layers[0].layer_number) - 1
    for name, parameter in module.named_parameters():
        yield (
            re.sub(r"(?<=decoder\.layers\.)\d+", lambda number: str(int(number.group()) + offset), name),
            parameter,
        )


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
