"""The flags of `--dry-run`, and what they ask for."""

import os
from dataclasses import dataclass

from megatron_codec.config import PretrainConfig


@dataclass(frozen=True)
class DryRunFlags:
    """A run that is only computed; it needs no data."""

    dry_run: bool = False
    """Print the memory, speed and time that the run would take, and end."""
    world_size: int | None = None
    """Of --dry-run: number of GPUs. Default: WORLD_SIZE of the environment, else TP x PP x CP."""
    gpu: str | None = None
    """Of --dry-run: the kind of GPU; every known one by default."""
    mfu: float = 0.4
    """Of --dry-run: utilization of the peak that speeds are computed for."""
    vocab_size: int = 320
    """Of --dry-run: bytes and merges of the tokenizer that there will be."""


@dataclass(frozen=True)
class DryRun:
    """A run that is only computed.

    Attributes:
        config: the run; data and folders may be left out.
        world_size: number of GPUs.
        vocab_size: bytes and merges of the tokenizer that there will be.
        mfu: utilization that speeds are computed for.
        gpu_name: the kind of GPU; None for every known one.
    """

    config: PretrainConfig
    world_size: int
    vocab_size: int
    mfu: float
    gpu_name: str | None

    @classmethod
    def of(cls, flags: DryRunFlags, config: PretrainConfig) -> "DryRun":
        """What the flags ask for; the number of GPUs is theirs, else WORLD_SIZE's, else TP x PP x CP."""
        world_size = flags.world_size
        if world_size is None:
            world_size = int(os.environ.get("WORLD_SIZE", max(1, config.parallel.model_parallel_size)))
        return cls(config, world_size, flags.vocab_size, flags.mfu, flags.gpu)
