"""The layout over processes, as flags. A group of `PretrainConfig`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_codec.errors import UserError, out_of_range, raise_all


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into (PP)."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Pieces of the model that each stage holds, interleaved over the stages, for a shorter wait."""
    context_parallel_size: int = 1
    """Processes that share each sequence (CP)."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """How Transformer Engine exchanges keys and values; the attention used without it gathers them."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence too; needs TP > 1."""
    use_distributed_optimizer: bool = True
    """Spread the optimizer state over the data-parallel processes. Always on (docs/decisions.md)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs --overlap-grad-reduce."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one model together: TP x PP x CP."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """DP among `world_size` processes; at least 1, also where `faults` has something to say."""
        return max(1, world_size // max(1, self.model_parallel_size))

    def check(self, world_size: int) -> None:
        """Raises:
        UserError: the layout contradicts itself or does not fit `world_size` processes.
        """
        raise_all(list(self.faults(world_size)))

    def faults(self, world_size: int) -> Iterator[UserError]:
        """What contradicts itself, or does not fit `world_size` processes."""
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
        }
        wrong = list(out_of_range(self, 1, *sizes, "num_virtual_stages_per_pipeline_rank"))
        yield from wrong
        together = self.model_parallel_size
        if not wrong and world_size % together:
            used = {name: size for name, size in sizes.items() if size > 1}
            flags = [f"--{name.replace('_', '-')} {size}" for name, size in used.items()]
            yield UserError(
                f"{world_size} processes",
                f"must be a multiple of {' x '.join(flags)} = {together}",
                f"start {-(-world_size // together) * together} processes (torchrun --nproc-per-node), or "
                "change the layout",
            )
        pp = self.pipeline_model_parallel_size
        if self.num_virtual_stages_per_pipeline_rank > 1 and pp == 1:
            yield UserError(
                f"--num-virtual-stages-per-pipeline-rank {self.num_virtual_stages_per_pipeline_rank}",
                "needs --pipeline-model-parallel-size above 1",
                "leave it out, or raise PP",
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
            yield UserError(
                "--sequence-parallel",
                "needs --tensor-model-parallel-size above 1",
                "leave it out, or raise TP",
            )
        if not self.use_distributed_optimizer:
            yield UserError(
                "--no-use-distributed-optimizer",
                "is not supported: checkpoints with and without it do not load into each other",
                "leave it out; with DP=1 nothing is exchanged",
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield UserError("--overlap-param-gather", "needs --overlap-grad-reduce", "give both or neither")
