"""The optimizer (Megatron-Core's distributed AdamW) and the schedule of its learning rate."""

from collections.abc import Sequence

import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from megatron_codec import platform
from megatron_codec.config import ParallelConfig, TrainingConfig
from megatron_codec.parallel import Layout
from megatron_codec.training.adam import Adam


def data_parallel(
    chunks: Sequence[GPTModel], parallel: ParallelConfig, layout: Layout
) -> list[DistributedDataParallel]:
    """Wraps each piece of the model so that gradients are summed in fp32 over the data-parallel group."""
    return [
        DistributedDataParallel(
            config=chunk.config,
            ddp_config=DistributedDataParallelConfig(
                grad_reduce_in_fp32=True,
                overlap_grad_reduce=parallel.overlap_grad_reduce,
                overlap_param_gather=parallel.overlap_param_gather,
                use_distributed_optimizer=True,
            ),
            module=chunk,
            # The gradients of later pieces are complete long before the step ends: nothing waits for them.
            disable_bucketing=number > 0,
            pg_collection=layout.groups,
        )
        for number, chunk in enumerate(chunks)
    ]


def gather_parameters(model: Sequence[DistributedDataParallel]) -> None:
    """Makes the weights of all pieces those of the last update; every process calls it.

    Under --overlap-param-gather each data-parallel process has only updated its own part of them until the
    next forward pass, so whoever else reads them asks for it.
    """
    for chunk in model:
        if chunk.ddp_config.overlap_param_gather:
            chunk.start_param_sync(force_sync=True)


def build_optimizer(
    model: list[DistributedDataParallel], training: TrainingConfig, parallel: ParallelConfig
) -> MegatronOptimizer:
    """AdamW whose state is spread over the data-parallel group; TE's or apex's fused Adam where present."""
    platform.install_adam(Adam)
    return get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=training.lr,
            min_lr=training.min_lr,
            weight_decay=training.weight_decay,
            adam_beta1=training.adam_beta1,
            adam_beta2=training.adam_beta2,
            adam_eps=training.adam_eps,
            clip_grad=training.clip_grad,
            bf16=training.bf16,
            params_dtype=torch.bfloat16 if training.bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=parallel.overlap_param_gather,
        ),
        [*model],
    )


def build_schedule(optimizer: MegatronOptimizer, training: TrainingConfig) -> OptimizerParamScheduler:
    """Linear warm-up, then the chosen decay to `min_lr`; counted in samples, as Megatron counts."""
    batch = training.global_batch_size
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=training.lr_warmup_iters * batch,
        lr_decay_steps=(training.lr_decay_iters or training.train_iters) * batch,
        lr_decay_style=training.lr_decay_style,
        wsd_decay_steps=(training.lr_wsd_decay_iters or 0) * batch,
        lr_wsd_decay_style=training.lr_wsd_decay_style,
        start_wd=training.weight_decay,
        end_wd=training.weight_decay,
        wd_incr_steps=training.train_iters * batch,
        wd_incr_style="constant",
        # The flags of this run rule; the checkpoint only says how far the schedule has come.
        use_checkpoint_opt_param_scheduler=False,
        override_opt_param_scheduler=True,
    )
