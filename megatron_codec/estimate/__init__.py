"""What a training run needs, computed without running it: `tools/pretrain.py --dry-run`."""

from megatron_codec.estimate.memory import Memory, Stage
from megatron_codec.estimate.report import dry_run
from megatron_codec.estimate.run import GPUS, Estimate, Gpu, estimate, gpu

__all__ = ["GPUS", "Estimate", "Gpu", "Memory", "Stage", "dry_run", "estimate", "gpu"]
