"""What a training run needs, computed without running it: `tools/pretrain.py --dry-run`."""

from megatron_codec.estimate.flops import TokenFlops, recomputed_flops, token_flops
from megatron_codec.estimate.gpus import GPUS, Gpu, gpu, peak_tflops
from megatron_codec.estimate.memory import Memory
from megatron_codec.estimate.report import dry_run
from megatron_codec.estimate.run import Estimate, estimate
from megatron_codec.estimate.stages import Stage

__all__ = [
    "GPUS",
    "Estimate",
    "Gpu",
    "Memory",
    "Stage",
    "TokenFlops",
    "dry_run",
    "estimate",
    "gpu",
    "peak_tflops",
    "recomputed_flops",
    "token_flops",
]
