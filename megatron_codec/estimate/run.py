"""Size, arithmetic and time of a run from its configuration alone."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.estimate.flops import model_parameters, recomputed_flops, token_flops
from megatron_codec.estimate.gpus import Gpu
from megatron_codec.estimate.pipeline import bubble
from megatron_codec.estimate.stages import Stage, stage

GIB = 2**30
# Set aside on every GPU for the CUDA context, NCCL's buffers and gaps between allocations. Not measured.
RESERVED = 4 * GIB


@dataclass(frozen=True)
class Estimate:
    """What a run needs.

    Attributes:
        parameters: of the whole model, each counted once.
        num_microbatches: in a step, of each process.
        bubble: share of a step's time in which a stage waits.
        flops_full, flops_causal: FLOPs a token, forward and backward, counting all of attention (PaLM) or
            its causal half (Megatron-LM). Recomputation is not counted.
        flops_recomputed: FLOPs a token that recomputation adds, counting all of attention.
        steps, tokens: of the whole run; passes over a dataset (`train_epochs`) are not known here.
    """

    config: PretrainConfig
    world_size: int
    dp: int
    vocab_rows: int
    parameters: int
    num_microbatches: int
    stages: tuple[Stage, ...]
    bubble: float
    flops_full: float
    flops_causal: float
    flops_recomputed: float
    steps: int
    tokens: int

    @property
    def fullest(self) -> int:
        """Number of the stage that needs the most memory."""
        return max(range(len(self.stages)), key=lambda i: self.stages[i].memory.total)

    def need(self, recompute: bool | None = None) -> int:
        """Bytes of the fullest stage, as configured or with recomputation of nothing or of every layer."""

        def total(stage: Stage) -> int:
            memory = {None: stage.memory, True: stage.with_recompute, False: stage.without_recompute}
            return memory[recompute].total

        return max(map(total, self.stages))

    def headroom(self, kind: Gpu, recompute: bool | None = None) -> int:
        """Bytes left on such a GPU beside what is needed and `RESERVED`; negative where it does not fit."""
        return int(kind.gib * GIB) - RESERVED - self.need(recompute)

    def tokens_per_second(self, kind: Gpu, mfu: float) -> float | None:
        """Of one GPU at a utilization that counts all of attention; None if it does not have the FP8."""
        peak = kind.peak(self.config.fp8)
        return None if peak is None else mfu * peak * 1e12 / self.flops_full

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values, with `fullest`."""
        return {**asdict(self), "fullest": self.fullest}


def faults(config: PretrainConfig, world_size: int) -> Iterator[UserError]:
    """What a run would refuse, data and folders left aside."""
    if world_size < 1:
        yield UserError(f"--world-size {world_size}", "must be at least 1", "give the number of GPUs")
        return
    yield from config.run_faults(world_size)


def estimate(config: PretrainConfig, world_size: int, num_tokens: int, on_cpu: bool = False) -> Estimate:
    """Computes everything for `world_size` GPUs and a tokenizer of `num_tokens` ids, BOS and EOS included.

    Args:
        on_cpu: count what differs where this package's own layers run on a CPU: keys and values gathered
            under context parallelism, norms that can be recomputed, outputs kept by interleaved pipelines.
            Without, Transformer Engine's layers on GPUs are counted.

    Raises:
        UserError: the configuration does not fit together.
    """
    raise_all(list(faults(config, world_size)))
    model, parallel, training = config.model, config.parallel, config.training
    pp = parallel.pipeline_model_parallel_size
    dp = parallel.data_parallel_size(world_size)
    rows = model.padded_vocab_size(num_tokens)
    steps = training.train_iters
    if training.train_samples is not None:
        steps = -(-training.train_samples // training.global_batch_size)
    flops = token_flops(config, rows)
    if training.train_flops is not None:
        batch = training.global_batch_size * model.seq_length
        steps = max(1, math.ceil(training.train_flops / flops.causal / batch))
    microbatches = training.num_microbatches(dp)
    stages = tuple(stage(config, i, dp, rows, on_cpu) for i in range(pp))
    return Estimate(
        config=config,
        world_size=world_size,
        dp=dp,
        vocab_rows=rows,
        parameters=model_parameters(config, rows),
        num_microbatches=microbatches,
        stages=stages,
        bubble=bubble(config, microbatches),
        flops_full=flops.full,
        flops_causal=flops.causal,
        flops_recomputed=recomputed_flops(config),
        steps=steps,
        tokens=steps * training.global_batch_size * model.seq_length,
    )
