"""Checkpoints: one folder, enough by itself, readable under any TP x PP x DP.

    DIR/iter_0000100/                       weights and optimizer, by megatron.core.dist_checkpointing
    DIR/iter_0000100/model.json             shape of the model, tokenizer, codec, how far it was trained
    DIR/latest_checkpointed_iteration.txt   the number of the newest whole checkpoint

A checkpoint is written under a temporary name and renamed, and only then named as the latest, so a run
that is killed at any moment leaves the one before it usable.
"""

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import extract_matching_values
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.models.gpt import GPTModel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch.distributed.checkpoint.api import CheckpointException

from megatron_codec import platform
from megatron_codec.config import ModelConfig
from megatron_codec.errors import UserError
from megatron_codec.files import whole_file, write_json
from megatron_codec.model import DelayedScales
from megatron_codec.parallel import Layout

logger = logging.getLogger(__name__)

LATEST = "latest_checkpointed_iteration.txt"
DESCRIPTION = "model.json"

# Optimizer state in the shape of the model's parameters, so that every layout can read it.
_METADATA = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}


# Transformer Engine's modules keep a state of their own (of FP8). Where a model without it wrote the
# checkpoint, or one without it reads, that state starts anew.
_EXTRA_STATE = "_extra_state"


@dataclass(frozen=True)
class Description:
    """What a checkpoint says of itself, besides its tensors.

    Attributes:
        model: shape of the decoder.
        tokenizer: the whole vocabulary, as `Tokenizer.to_dict` gives it.
        codec: name and settings, as `Codec.to_dict` gives them.
        dataset_hash: hash of the manifest that it was trained on.
        iteration: steps done.
        consumed_samples: sequences seen.
        bf16: whether the weights are stored in bfloat16.
        fp8: the FP8 settings that it was trained with, or None.
        optimizer: whether it has the state of an optimizer; one that was converted has weights alone.
    """

    model: ModelConfig
    tokenizer: dict[str, Any]
    codec: dict[str, Any]
    dataset_hash: str
    iteration: int
    consumed_samples: int
    bf16: bool
    fp8: dict[str, Any] | None = None
    optimizer: bool = True

    @classmethod
    def read(cls, folder: Path, name: str = DESCRIPTION) -> "Description":
        """Raises:
        UserError: the file is missing, is not JSON, or lacks a field.
        """
        path = folder / name
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            values["model"] = ModelConfig(**values["model"])
            values = {"fp8": None, "optimizer": True} | values  # of checkpoints from before there were these
            return cls(**{field.name: values[field.name] for field in fields(cls)})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                str(path),
                f"is not the description of a checkpoint ({error})",
                "give a folder written by --save",
            ) from error


def latest(folder: str | Path) -> Path:
    """The newest whole checkpoint in a folder of checkpoints, or the folder itself if it is one.

    Raises:
        UserError: there is none.
    """
    folder = Path(folder)
    if (folder / DESCRIPTION).exists():
        return folder
    try:
        iteration = int((folder / LATEST).read_text())
    except (OSError, ValueError) as error:
        raise UserError(
            f"--load {folder}",
            f"holds no checkpoint (no readable {LATEST} in it)",
            "give the folder that was --save of tools/pretrain.py",
        ) from error
    return folder / name_of(iteration)


def exists(folder: str | Path) -> bool:
    """Whether a folder of checkpoints names a newest one."""
    return (Path(folder) / LATEST).exists()


def save(
    folder: str | Path,
    description: Description,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    scales: DelayedScales,
    layout: Layout,
) -> Path:
    """Writes a checkpoint; every process calls it.

    Raises:
        OSError: the folder cannot be written.
    """
    folder = Path(folder)
    final = folder / name_of(description.iteration)
    partial = folder / f".{final.name}.tmp"
    if layout.is_main:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    torch.distributed.barrier()
    state = _state(chunks, optimizer, schedule) | {"fp8": scales.sharded_state_dict()}
    platform.save_without_another_process()
    dist_checkpointing.save(state, str(partial), content_metadata=dict(_METADATA))
    torch.distributed.barrier()
    if layout.is_main:
        write_json(partial / DESCRIPTION, asdict(description))
        shutil.rmtree(final, ignore_errors=True)
        partial.rename(final)
        with whole_file(folder / LATEST, "w") as stream:
            stream.write(f"{description.iteration}\n")
    torch.distributed.barrier()
    return final


def load_weights(checkpoint: Path, chunks: Sequence[GPTModel]) -> None:
    """Fills the weights of all pieces from a checkpoint that may have been written under any layout."""
    _fill(chunks, _load(_model_state(chunks), checkpoint))


def load(
    checkpoint: Path,
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
) -> None:
    """Fills weights, optimizer and schedule, so that training goes on as if it had never stopped."""
    loaded = _load(_state(chunks, optimizer, schedule, is_loading=True), checkpoint)
    _fill(chunks, loaded)
    optimizer.load_state_dict(loaded["optimizer"])
    schedule.load_state_dict(loaded["schedule"])


def load_scales(checkpoint: Path, scales: DelayedScales) -> None:
    """Fills the scales of emulated FP8, for a checkpoint that was trained with the same settings of it."""
    if scales.scales:
        scales.load_state_dict(_load({"fp8": scales.sharded_state_dict()}, checkpoint)["fp8"])


def _fill(chunks: Sequence[GPTModel], loaded: dict[str, Any]) -> None:
    for name, chunk in zip(_names(chunks), chunks, strict=True):
        absent, unknown = chunk.load_state_dict(loaded[name], strict=False)
        wrong = [key for key in [*absent, *unknown] if not key.endswith(_EXTRA_STATE)]
        assert not wrong, wrong  # every weight was asked for by its name above


def _load(state: dict[str, Any], checkpoint: Path) -> dict[str, Any]:
    try:
        kept = load_sharded_metadata(str(checkpoint))

        def is_absent(part: Any) -> bool:
            return (
                isinstance(part, ShardedObject)
                and part.key.endswith(_EXTRA_STATE)
                and part.unique_key not in kept
            )

        _, present = extract_matching_values(state, is_absent)
        assert isinstance(present, dict)
        loaded = dist_checkpointing.load(present, str(checkpoint))
    # Files that are missing, cut short or altered raise a dozen types, one of them outside of Exception.
    except (Exception, CheckpointException) as error:
        failures = error.failures if isinstance(error, CheckpointException) else {0: (error, None)}
        cause, _ = next(iter(failures.values()))
        raise UserError(
            str(checkpoint),
            f"cannot be loaded ({type(cause).__name__}: {str(cause).partition(chr(10))[0][:120]})",
            "it is damaged: give an older checkpoint of the run (one iter_... folder), or copy it again",
        ) from error
    assert isinstance(loaded, dict)  # a tuple only where unexpected keys were asked for
    return loaded


def name_of(iteration: int) -> str:
    """The folder of a checkpoint."""
    return f"iter_{iteration:07d}"


def _names(chunks: Sequence[GPTModel]) -> list[str]:
    """Megatron-Core's optimizer looks for the pieces of an interleaved model under these names."""
    return ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]


def _model_state(chunks: Sequence[GPTModel]) -> dict[str, Any]:
    return {
        name: chunk.sharded_state_dict(metadata=dict(_METADATA))
        for name, chunk in zip(_names(chunks), chunks, strict=True)
    }


def _state(
    chunks: Sequence[GPTModel],
    optimizer: MegatronOptimizer,
    schedule: OptimizerParamScheduler,
    is_loading: bool = False,
) -> dict[str, Any]:
    model_state = _model_state(chunks)
    return {
        **model_state,
        "optimizer": optimizer.sharded_state_dict(
            model_state, is_loading=is_loading, metadata=dict(_METADATA)
        ),
        "schedule": schedule.state_dict(),
    }
