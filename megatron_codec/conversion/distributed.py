"""Weights in a checkpoint of ours, read and written tensor by tensor, without a model and in one process.

Megatron-Core's `dist_checkpointing` takes all tensors at once from memory. Its files are those of
torch.distributed.checkpoint, so that library's readers and writers do here what it does: the layers' tensors
are stacked ([layers, rows, columns], a chunk for each layer and tensor-parallel rank), and whoever reads cuts
as its layout needs.
"""

import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    LoadPlan,
    LoadPlanner,
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_codec.config import ModelConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.files import write_json
from megatron_codec.model.hf import Weight, shape_of, weights_of
from megatron_codec.training.checkpoint import DESCRIPTION, Description


class Checkpoint:
    """The weights of a checkpoint by our names, whole, whatever layout wrote them.

    Args:
        path: one `iter_...` folder.
        num_tokens: ids of the tokenizer; the padding of the vocabulary is left out.

    Raises:
        UserError: it cannot be read, or its tensors are not those of this shape.
    """

    def __init__(self, path: Path, model: ModelConfig, num_tokens: int):
        self.path, self.model, self.num_tokens = path, model, num_tokens
        self._reader = FileSystemReader(path)
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
        except Exception as error:  # whatever unpickling a damaged file raises
            raise self._damaged(error) from error
        self._stored: dict[str, Any] = metadata.state_dict_metadata
        faults: list[UserError] = []
        for weight in weights_of(model):
            stored, shape = self._stored.get(weight.key), _stacked(weight, model, num_tokens)
            if not isinstance(stored, TensorStorageMetadata):
                faults.append(
                    UserError(f"{path}: {weight.key}", "is missing", "it is damaged: copy it again")
                )
            elif tuple(stored.size) != shape:
                rule = f"has the shape {list(stored.size)}; by model.json it is {list(shape)}"
                faults.append(UserError(f"{path}: {weight.key}", rule, "copy the checkpoint again"))
        raise_all(list({str(fault): fault for fault in faults}.values()))  # once for all layers
        self.dtypes = {self._stored[weight.key].properties.dtype for weight in weights_of(model)}
        self.dtype = torch.bfloat16 if self.dtypes == {torch.bfloat16} else torch.float32

    def read(self, weight: Weight) -> Tensor:
        """A weight, with a row for each id where it has such rows, in the type of the file.

        Raises:
            UserError: the file is damaged.
        """
        if weight.layer is not None:
            return self._read(weight, weight.layer, 1)[0]
        return self._read(weight, 0, self.num_tokens if weight.has_rows_of_ids else None)

    def padding(self, weight: Weight) -> Tensor:
        """The rows behind those of the ids."""
        return self._read(weight, self.num_tokens, None)

    def _read(self, weight: Weight, start: int, count: int | None) -> Tensor:
        """`count` entries of the first dimension of what is stored, or all from `start` on."""
        stored = self._stored[weight.key]
        offsets, sizes = [0] * len(stored.size), list(stored.size)
        offsets[0], sizes[0] = start, sizes[0] - start if count is None else count
        target = torch.empty(sizes, dtype=stored.properties.dtype)
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        plan = LoadPlan(create_read_items_for_chunk_list(weight.key, stored, [wanted]))
        try:
            self._reader.read_data(plan, _Into(target)).wait()
        except Exception as error:  # missing and truncated files raise many types
            raise self._damaged(error) from error
        return target

    def _damaged(self, error: Exception) -> UserError:
        return UserError(
            str(self.path),
            f"cannot be read ({type(error).__name__}: {str(error)[:120]})",
            "it is damaged: give an older checkpoint of the run (one iter_... folder), or copy it again",
        )


def write(
    path: Path,
    description: Description,
    read: Callable[[Weight], Tensor],
    padding: Callable[[Weight], Tensor],
    num_tokens: int,
) -> None:
    """Writes the weights that `read` gives, and the description, as a checkpoint without an optimizer.

    Args:
        path: a folder that exists.
        padding: rows behind those of the `num_tokens` ids; where they are too few, zeros follow.
    """
    planner = _Streamed(description, read, padding, num_tokens)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # nobody else takes part
        try:
            save({}, storage_writer=FileSystemWriter(path), planner=planner, no_dist=True)
        except CheckpointException as error:  # what a source or the disk raised, Ctrl-C too
            cause, _ = next(iter(error.failures.values()))
            raise cause from None
    torch.save({}, path / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(path))
    write_json(path / DESCRIPTION, asdict(description))


def _stacked(weight: Weight, model: ModelConfig, num_tokens: int) -> tuple[int, ...]:
    """The shape in a checkpoint: padded, and of all layers."""
    shape = shape_of(weight.row.shape, model, model.padded_vocab_size(num_tokens))
    return shape if weight.layer is None else (model.num_layers, *shape)


class _Into(LoadPlanner):
    """Lets a reader put what it reads into a tensor."""

    def __init__(self, target: Tensor):
        self.target = target

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> LoadPlan:
        """Not asked for: `Checkpoint.read` makes the plan."""
        raise NotImplementedError

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """As it is."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """As it is."""
        return central_plan

    def load_bytes(self, read_item, value) -> None:
        """Not asked for: weights are tensors."""
        raise NotImplementedError

    def resolve_tensor(self, read_item) -> Tensor:
        """The part of the target that an item of the plan fills."""
        part = self.target
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            part = part.narrow(dim, start, length)
        return part

    def commit_tensor(self, read_item, tensor) -> None:
        """It is in its place already."""


class _Streamed(SavePlanner):
    """Makes each tensor when its turn to be written has come."""

    def __init__(
        self,
        description: Description,
        read: Callable[[Weight], Tensor],
        padding: Callable[[Weight], Tensor],
        num_tokens: int,
    ):
        self.model, self.num_tokens = description.model, num_tokens
        self.read, self.padding = read, padding
        self.dtype = torch.bfloat16 if description.bf16 else torch.float32
        self._weights: dict[tuple[str, int], Weight] = {}

    def set_up_planner(self, state_dict, storage_meta=None, is_coordinator=False) -> None:
        """Nothing to prepare."""

    def create_local_plan(self) -> SavePlan:
        """An item for each weight."""
        items = []
        for weight in weights_of(self.model):
            whole = _stacked(weight, self.model, self.num_tokens)
            offsets, sizes = [0] * len(whole), list(whole)
            if weight.layer is not None:
                offsets[0], sizes[0] = weight.layer, 1
            data = TensorWriteData(
                chunk=ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)),
                properties=TensorProperties(dtype=self.dtype),
                size=torch.Size(whole),
            )
            index = MetadataIndex(weight.key, torch.Size(offsets))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
            self._weights[weight.key, offsets[0]] = weight
        return SavePlan(items)

    def create_global_plan(self, all_plans):
        """What torch does by default."""
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """As it is."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        """The tensor of an item."""
        index, data = write_item.index, write_item.tensor_data
        assert index.offset is not None and data is not None
        weight = self._weights[index.fqn, index.offset[0]]
        tensor = self.read(weight).to(self.dtype)
        if weight.has_rows_of_ids:
            rows = torch.zeros(data.chunk.sizes, dtype=self.dtype)
            rest = self.padding(weight)[: len(rows) - len(tensor)]
            rows[: len(tensor)], rows[len(tensor) : len(tensor) + len(rest)] = tensor, rest
            return rows
        return tensor.view(data.chunk.sizes)
