"""A whole training run, as flags, and what is wrong with their combination."""

from collections.abc import Iterator
from dataclasses import dataclass, field

from megatron_codec.config.checkpoint import CheckpointConfig
from megatron_codec.config.data import DataConfig
from megatron_codec.config.fp8 import Fp8Config, transformer_engine_installed
from megatron_codec.config.logging import LoggingConfig
from megatron_codec.config.model import ModelConfig
from megatron_codec.config.parallel import ParallelConfig
from megatron_codec.config.training import TrainingConfig
from megatron_codec.errors import UserError, raise_all


@dataclass(frozen=True)
class PretrainConfig:
    """Everything a training run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    fp8: Fp8Config = field(default_factory=Fp8Config)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def faults(self, world_size: int) -> Iterator[UserError]:
        """Every fault of the configuration for `world_size` processes of this machine."""
        yield from self.run_faults(world_size)
        if self.fp8.fp8_format and not self.fp8.fp8_emulation and not transformer_engine_installed():
            yield UserError(
                f"--fp8-format {self.fp8.fp8_format}",
                "needs Transformer Engine, which is not installed",
                "pip install 'megatron_codec[gpu]' on a machine with CUDA, or add --fp8-emulation to try the "
                "recipe without",
            )
        yield from self.data.faults()
        yield from self.checkpoint.faults()
        yield from self.logging.faults(
            world_size,
            save=self.checkpoint.save,
            mock_data=self.data.mock_data,
            train_iters=None if self.training.steps_depend_on_data else self.training.train_iters,
        )

    def run_faults(self, world_size: int) -> Iterator[UserError]:
        """Those of model, layout and training, and of their combination; data and folders left aside."""
        dp = self.parallel.data_parallel_size(world_size)
        each = [
            *self.parallel.faults(world_size),
            *self.model.faults(self.parallel),
            *self.training.faults(dp),
        ]
        yield from each
        if each:
            return
        chunks = (
            self.parallel.pipeline_model_parallel_size * self.parallel.num_virtual_stages_per_pipeline_rank
        )
        yield from self.training.recompute_faults(self.model.num_layers // chunks)
        yield from self.fp8.faults(self.model, self.parallel, self.training)
        if self.logging.sample_interval is not None and (
            self.parallel.num_virtual_stages_per_pipeline_rank > 1
        ):
            yield UserError(
                f"--sample-interval {self.logging.sample_interval}",
                "cannot sample from interleaved stages (--num-virtual-stages-per-pipeline-rank "
                f"{self.parallel.num_virtual_stages_per_pipeline_rank})",
                "leave one of them out; tools/generate.py samples from the checkpoints",
            )
        pp, microbatches = self.parallel.pipeline_model_parallel_size, self.training.num_microbatches(dp)
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1 and microbatches % pp:
            together = self.training.micro_batch_size * dp * pp
            yield UserError(
                f"--global-batch-size {self.training.global_batch_size}",
                f"makes {microbatches} micro-batches, and --num-virtual-stages-per-pipeline-rank needs a "
                f"multiple of --pipeline-model-parallel-size {pp}",
                f"use {-(-self.training.global_batch_size // together) * together}",
            )

    def check(self, world_size: int) -> None:
        """Raises:
        UserError: every fault of the configuration for `world_size` processes, all at once.
        """
        raise_all(list(self.faults(world_size)))
