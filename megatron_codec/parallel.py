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
        tp, pp, cp, dp: sizes of the tensor-, pipeline-, context- and data-parallel groups.
        vp: pieces of the model that each process holds; above 1, pipeline stages are interleaved.
        tp_rank, pp_rank, cp_rank, dp_rank: this process's place in its groups.
        groups: Megatron-Core's process groups, for the modules that take them.
        device: where this process computes.
    """

    tp: int
    pp: int
    cp: int
    dp: int
    vp: int
    tp_rank: int
    pp_rank: int
    cp_rank: int
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
        return self.tp * self.pp * self.cp * self.dp

    @property
    def is_main(self) -> bool:
        """Whether this process speaks for all: writes the log's head, manifests and pictures."""
        return self.rank == 0

    def has_embedding(self, chunk: int = 0) -> bool:
        """Whether the embedding is in this process's piece number `chunk` of the model."""
        return self.pp_rank == 0 and chunk == 0

    def has_output(self, chunk: int = 0) -> bool:
        """Whether logits and loss are computed in this process's piece number `chunk` of the model."""
        return self.pp_rank == self.pp - 1 and chunk == self.vp - 1

    def positions(self, seq_length: int) -> torch.Tensor:
        """Which tokens of a sequence this process holds, int64 [seq_length / CP]."""
        return context_parallel_positions(seq_length, self.cp, self.cp_rank, self.device)

    def __str__(self) -> str:
        parts = [f"TP={self.tp} PP={self.pp}"]
        if self.vp > 1:
            parts.append(f"VP={self.vp}")
        if self.cp > 1:
            parts.append(f"CP={self.cp}")
        return " ".join([*parts, f"DP={self.dp}"])


def context_parallel_positions(seq_length: int, cp: int, cp_rank: int, device: torch.device) -> torch.Tensor:
    """Which tokens of a sequence a context-parallel rank holds, int64 [seq_length / cp].

    Under a causal mask late tokens cost more than early ones, so of 2 x CP pieces rank r has the r-th and
    the r-th from the end, as Megatron-Core and Transformer Engine cut them.
    """
    whole = torch.arange(seq_length, device=device)
    if cp == 1:
        return whole
    pieces = whole.chunk(2 * cp)
    return torch.cat([pieces[cp_rank], pieces[-1 - cp_rank]])


def world_size_from_environment() -> int:
    """How many processes the launcher (torchrun, or srun with its variables exported) has started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def initialize(config: ParallelConfig, seed: int = 1234, timeout_minutes: int = 30) -> Layout:
    """Joins the processes that torchrun started, or makes a world of one, and lays out the groups.

    It may be called again: models of one layout share its groups, another layout ends those before it.

    Raises:
        UserError: the number of processes is not a multiple of TP x PP x CP.
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
    vp = config.num_virtual_stages_per_pipeline_rank
    sizes = {
        "tensor_model_parallel_size": config.tensor_model_parallel_size,
        "pipeline_model_parallel_size": config.pipeline_model_parallel_size,
        "context_parallel_size": config.context_parallel_size,
        "virtual_pipeline_model_parallel_size": vp if vp > 1 else None,
    }
    if _current_sizes() != sizes:
        _leave_groups()
        parallel_state.initialize_model_parallel(
            **sizes,
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
        cp=config.context_parallel_size,
        dp=parallel_state.get_data_parallel_world_size(),
        vp=vp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
    )


def _current_sizes() -> dict[str, int | None] | None:
    """Sizes of the groups that there are."""
    if not parallel_state.model_parallel_is_initialized():
        return None
    return {
        "tensor_model_parallel_size": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": parallel_state.get_pipeline_model_parallel_world_size(),
        "context_parallel_size": parallel_state.get_context_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            parallel_state.get_virtual_pipeline_model_parallel_world_size()
        ),
    }


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
