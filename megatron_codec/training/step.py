"""One training step, and one evaluation, through Megatron-Core's pipeline schedules."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_codec.config import TrainingConfig
from megatron_codec.parallel import Layout
from megatron_codec.training.batches import Loader


@dataclass(frozen=True)
class StepResult:
    """What a step reports, the same on every process.

    Attributes:
        loss: mean nats a token over the global batch.
        grad_norm: global norm of the gradient before clipping.
        skipped: whether the update was left out because a gradient was not finite.
        data_wait: seconds that this process waited for its micro-batches.
    """

    loss: float
    grad_norm: float
    skipped: bool
    data_wait: float = 0.0


def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module):
    """Megatron-Core's contract: returns the output and a function from it to (loss, what to report)."""
    batch = next(batches)
    # The attention computes its causal mask itself.
    losses = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
    return losses, partial(_masked_mean, loss_mask=batch["loss_mask"])


def _masked_mean(losses: Tensor, loss_mask: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    nats, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    # The schedule divides the loss in place by the number of micro-batches; what is reported stays as it is.
    return nats / tokens.clamp(min=1), {"nats": nats.detach(), "tokens": tokens}


def connect(model: DistributedDataParallel, optimizer: MegatronOptimizer) -> None:
    """Tells the schedules how to reduce gradients and where the optimizer wants them."""
    config = model.config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if model.ddp_config.overlap_grad_reduce:
        config.no_sync_func = model.no_sync
    if model.ddp_config.overlap_param_gather:
        config.param_sync_func = model.start_param_sync


def train_step(
    model: DistributedDataParallel,
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    loader: Loader,
    iteration: int,
    training: TrainingConfig,
    layout: Layout,
) -> StepResult:
    """Forward and backward over all micro-batches, reduction, clipping, update."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    waited = loader.waited
    reports = _run_schedule(model, loader, iteration, training, layout, forward_only=False)
    updated, grad_norm, _ = optimizer.step()  # type: ignore[misc]  abstract in the base class
    schedule.step(increment=training.global_batch_size)
    return StepResult(
        loss=_mean_over_world(_total(reports, layout)),
        grad_norm=float(grad_norm or 0.0),
        skipped=not updated,
        data_wait=loader.waited - waited,
    )


@torch.no_grad()
def evaluate(
    model: DistributedDataParallel,
    loader: Loader,
    iterations: int,
    training: TrainingConfig,
    layout: Layout,
) -> float:
    """Mean nats a token over the first `iterations` global batches of held-out rows."""
    model.eval()
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for i in range(iterations):
        total += _total(_run_schedule(model, loader, i, training, layout, forward_only=True), layout)
    model.train()
    return _mean_over_world(total)


def _run_schedule(
    model: DistributedDataParallel,
    loader: Loader,
    iteration: int,
    training: TrainingConfig,
    layout: Layout,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=loader.step(iteration),
        model=model,
        num_microbatches=training.num_microbatches(layout.dp),
        seq_length=loader.samples.seq_length,
        micro_batch_size=training.micro_batch_size,
        forward_only=forward_only,
    )


def _total(reports: list[dict[str, Tensor]], layout: Layout) -> Tensor:
    """Nats and tokens of this process, float64 [2]; zeros but on the last stage, which has the losses."""
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for report in reports:
        total += torch.stack([report["nats"].double(), report["tokens"].double()])
    return total


def _mean_over_world(total: Tensor) -> float:
    # Every rank of a tensor-parallel group adds the same, to both, so the mean is right.
    torch.distributed.all_reduce(total)
    return float(total[0] / total[1])
