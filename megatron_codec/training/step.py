"""One training step, and one evaluation, through Megatron-Core's pipeline schedules."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

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


def forward_step(batches: Iterator[dict[str, Tensor]], model: torch.nn.Module, layout: Layout):
    """Megatron-Core's contract: returns the output and a function from it to (loss, what to report)."""
    batch = next(batches)
    # The attention computes its causal mask itself.
    losses = model(batch["tokens"], batch["position_ids"], attention_mask=None, labels=batch["labels"])
    return losses, partial(_masked_mean, loss_mask=batch["loss_mask"], layout=layout)


def _masked_mean(losses: Tensor, loss_mask: Tensor, layout: Layout) -> tuple[Tensor, dict[str, Tensor]]:
    nats, tokens = (losses.float() * loss_mask).sum(), loss_mask.sum()
    of_sequences = tokens
    if layout.cp > 1:  # each context-parallel rank has the losses of its part of the sequences
        of_sequences = tokens.clone()
        torch.distributed.all_reduce(of_sequences, group=layout.groups.cp)
    # The schedule multiplies the loss by CP, since gradients are averaged over DP x CP, and divides it in
    # place by the number of micro-batches; what is reported stays as it is.
    return nats / of_sequences.clamp(min=1), {"nats": nats.detach(), "tokens": tokens}


def connect(model: list[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Tells the schedules how to reduce gradients and where the optimizer wants them."""
    config: Any = model[0].config  # the one of all pieces; its annotations know no lists of functions
    settings = model[0].ddp_config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads

    def of_each(functions: list):
        return functions if len(functions) > 1 else functions[0]

    if settings.overlap_grad_reduce:
        config.no_sync_func = of_each([chunk.no_sync for chunk in model])
        if len(model) > 1:  # all stages start the reduction of a piece together
            config.grad_sync_func = [chunk.start_grad_sync for chunk in model]
    if settings.overlap_param_gather:
        config.param_sync_func = of_each([chunk.start_param_sync for chunk in model])


def train_step(
    model: list[DistributedDataParallel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    loader: Loader,
    iteration: int,
    training: TrainingConfig,
    layout: Layout,
) -> StepResult:
    """Forward and backward over all micro-batches, reduction, clipping, update."""
    for chunk in model:
        chunk.zero_grad_buffer()
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
    model: list[DistributedDataParallel],
    loader: Loader,
    iterations: int,
    training: TrainingConfig,
    layout: Layout,
) -> float:
    """Mean nats a token over the first `iterations` global batches of held-out rows."""
    for chunk in model:
        chunk.eval()
    total = torch.zeros(2, dtype=torch.float64, device=layout.device)
    for i in range(iterations):
        total += _total(_run_schedule(model, loader, i, training, layout, forward_only=True), layout)
    for chunk in model:
        chunk.train()
    return _mean_over_world(total)


def _run_schedule(
    model: list[DistributedDataParallel],
    loader: Loader,
    iteration: int,
    training: TrainingConfig,
    layout: Layout,
    forward_only: bool,
) -> list[dict[str, Tensor]]:
    # Every piece of the model takes each micro-batch; the loader reads it once.
    batches = itertools.tee(loader.step(iteration), len(model))
    return get_forward_backward_func()(
        forward_step_func=partial(forward_step, layout=layout),
        data_iterator=list(batches) if len(model) > 1 else batches[0],
        model=[*model] if len(model) > 1 else model[0],  # the elements are of a wider type there
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
