"""The parallel layout: one small object that says who this process is, made once and passed.

Ranks are laid out as Megatron-Core lays them out (order tp-cp-ep-dp-pp): neighbours in a tensor-parallel
group are neighbours in rank, and so sit on one node.
"""

import datetime
import logging
import os
from dataclasses import dataclass

import torch
from torch._C._distributed_c10d import HashStore
from torch.distributed import distributed_c10d

from megatron_codec import platform
from megatron_codec.config import ParallelConfig

PLATFORM = platform.prepare()

from megatron.core import parallel_state, tensor_parallel  # noqa: E402
from megatron.core.process_groups_config import ProcessGroupCollection  # noqa: E402

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Layout:
    """Sizes of the parallel groups and this process's place in them.

    Attributes:
        tp, pp, dp: sizes of the tensor-, pipeline- and data-parallel groups.
        tp_rank, pp_rank, dp_rank: this process's place in its groups.
        groups: Megatron-Core's process groups, for the modules that take them.
        device: where this process computes.
    """

    tp: int
    pp: int
    dp: int
    tp_rank: int
    pp_rank: int
    dp_rank: int
    groups: ProcessGroupCollection
    device: torch.device

    @property
    def rank(self) -> int:
        """Of this process in the world."""
        return torch.distributed.get_rank()

    @property
    def world_size(self) -> int:
        """Number of processes."""
        return self.tp * self.pp * self.dp

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: writes the log's head, manifests and pictures."""
        return self.rank == 0

    @property
    def is_first_stage(self) -> bool:
        """Whether the embedding is here."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether logits and loss are computed here."""
        return self.pp_rank == self.pp - 1

    def __str__(self) -> str:
        return f"TP={self.tp} PP={self.pp} DP={self.dp}"


def world_size_from_environment() -> int:
    """How many processes the launcher (torchrun, or srun with its variables exported) has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: ParallelConfig, seed: int = 1234, timeout_minutes: int = 30) -> Layout:
    """Joins the processes that torchrun started, or makes a world of one, and lays out the groups.

    It may be called again: models of one layout share its groups, another layout ends those before it.

    Raises:
        UserError: the number of processes is not a multiple of TP x PP.
    """
    world_size = world_size_from_environment()
    config.check(world_size)
    if PLATFORM.backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if not torch.distributed.is_initialized():
        timeout = datetime.timedelta(minutes=timeout_minutes)
        if "RANK" in os.environ:
            torch.distributed.init_process_group(PLATFORM.backend, timeout=timeout)
        else:  # without a launcher there is nobody to meet
            torch.distributed.init_process_group(
                PLATFORM.backend, store=HashStore(), rank=0, world_size=1, timeout=timeout
            )
    if _current_sizes() != (config.tensor_model_parallel_size, config.pipeline_model_parallel_size):
        _leave_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=config.tensor_model_parallel_size,
            pipeline_model_parallel_size=config.pipeline_model_parallel_size,
            distributed_timeout_minutes=timeout_minutes,
            create_gloo_process_groups=True,
        )
    # Only recomputation and dropout draw from these; initial weights have their own seeds (model.initialize).
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    device = (
        torch.device("cuda", torch.cuda.current_device()) if PLATFORM.backend == "nccl" else PLATFORM.device
    )
    return Layout(
        tp=config.tensor_model_parallel_size,
        pp=config.pipeline_model_parallel_size,
        dp=parallel_state.get_data_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
    )


def _current_sizes() -> tuple[int, int] | None:
    """TP and PP of the groups that there are."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    return (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
    )


def _leave_groups() -> None:
    """Ends every group but the world; Megatron-Core only forgets them, and each keeps its threads."""
    parallel_state.destroy_model_parallel()
    for group in list(distributed_c10d._world.pg_map):
        if group is not torch.distributed.group.WORLD:
            torch.distributed.destroy_process_group(group)


def shut_down() -> None:
    """Leaves the process groups, so that the launcher sees a clean end."""
    if torch.distributed.is_initialized():
        _leave_groups()
        torch.distributed.destroy_process_group()
