"""How an engine is set up, and how much memory its key-value cache takes."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_codec.config import ModelConfig, ParallelConfig
from megatron_codec.errors import UserError, out_of_range
from megatron_codec.inference.blocks import BLOCK, blocks_for
from megatron_codec.parallel import Layout

_SHARE = {"cuda": 0.85, "cpu": 0.5}  # of the free memory, for a cache of no given size


@dataclass(frozen=True)
class EngineConfig:
    """Of a generation engine. In fp32 only --weight-dtype changes what is sampled."""

    dtype: Literal["float32", "bfloat16"] | None = None
    """What to compute in; by default what the model was trained in."""
    weight_dtype: Literal["int8"] | None = None
    """What to keep the weights of the layers in; by default that of --dtype. int8, rounded with one scale for
    each output channel, halves the memory of bf16, and on a CPU with AMX nearly halves the time of a token
    (docs/decisions.md). Embedding and output layer are not rounded."""
    cuda_graphs: bool = True
    """On a GPU, without TP and PP: record the steps that decode and start their kernels together. Each power
    of two of samples is recorded when it is first met."""
    max_batch_size: int = 64
    """Samples that are continued together; others wait."""
    prefill_chunk_size: int = 512
    """Prompt tokens that are computed in a step, beside a token of every running sample."""
    cache_tokens: int | None = None
    """Tokens in the key-value cache, of all samples together; by default as many as --max-batch-size samples
    can have, or as fit into half of a CPU's free memory, or 85% of a GPU's."""
    canonical: bool = False
    """Of what the grammar lets follow, only what an encoder of the same picture writes: no run of sixteen
    zeros at the end of a block."""
    in_range: bool = False
    """Of what the grammar lets follow, only coefficients that pictures of 8 bits have."""
    tensor_model_parallel_size: int = 1
    """Processes that share each layer, under torchrun."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into, under torchrun."""

    @property
    def parallel(self) -> ParallelConfig:
        """Its layout in training's words."""
        return ParallelConfig(
            tensor_model_parallel_size=self.tensor_model_parallel_size,
            pipeline_model_parallel_size=self.pipeline_model_parallel_size,
        )

    def faults(self) -> Iterator[UserError]:
        """Numbers out of range, and what does not go together."""
        yield from out_of_range(self, 1, "max_batch_size", "prefill_chunk_size", "cache_tokens")


def bytes_per_token(config: TransformerConfig, layout: Layout) -> int:
    """Keys and values of one token in the layers of this process."""
    groups = (config.num_query_groups or config.num_attention_heads) // layout.tp
    assert config.kv_channels is not None
    return 2 * (config.num_layers // layout.pp) * groups * config.kv_channels * config.params_dtype.itemsize


def cache_blocks(
    config: EngineConfig, megatron: TransformerConfig, model: ModelConfig, layout: Layout
) -> int:
    """Blocks of the cache, the same on every process of the layout.

    Raises:
        UserError: not even one sample of full length would fit.
    """
    whole = blocks_for(model.seq_length)
    if config.cache_tokens is not None:
        return max(1, config.cache_tokens // BLOCK)
    fit = blocks_that_fit(megatron, layout)
    if fit < whole:
        raise UserError(
            f"{fit * BLOCK} tokens of key-value cache",
            f"fit into memory, fewer than the model's context of {model.seq_length}",
            "use more processes (TP, PP), or set --cache-tokens to allow shorter samples only",
        )
    return min(config.max_batch_size * whole, fit)


def blocks_that_fit(megatron: TransformerConfig, layout: Layout) -> int:
    """How many blocks the free memory has room for, on every process of the layout."""
    size = BLOCK * bytes_per_token(megatron, layout)
    fit = torch.tensor(int(_SHARE[layout.device.type] * _free_bytes(layout) / size), device=layout.device)
    torch.distributed.all_reduce(fit, op=torch.distributed.ReduceOp.MIN, group=layout.groups.mp)
    return int(fit)


def _free_bytes(layout: Layout) -> int:
    """Memory that can be had; on a CPU shared among the processes of the layout."""
    if layout.device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(layout.device)
        return free + torch.cuda.memory_reserved(layout.device) - torch.cuda.memory_allocated(layout.device)
    pages = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return pages // (layout.tp * layout.pp)
