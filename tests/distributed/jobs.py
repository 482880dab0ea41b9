"""What launched processes do; the tests call these through `launch`."""

import hashlib
import multiprocessing
import os
import signal
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_codec import files
from megatron_codec.flags import parse_pretrain
from megatron_codec.inference import Engine, EngineConfig
from megatron_codec.inference.training_samples import PictureSampler
from megatron_codec.model import initialize_weights
from megatron_codec.model.layers import RMSNorm
from megatron_codec.model.weights import named_parameters
from megatron_codec.parallel import Layout, context_parallel_positions, shut_down
from megatron_codec.training import checkpoint, pretrain
from megatron_codec.training.batches import Loader
from tests.unconstrained import Sampling


def train(command_lines: list[list[str]]) -> list[dict[str, Any]]:
    """Runs through the command lines of tools/pretrain.py, in one world of processes.

    Returns:
        Of each run its last `validation_loss`; `rows`: of each iteration, a hash of each sample that this
        rank was trained on, in order; `weights`: a hash of each of this rank's initial weights; `children`:
        how many processes it left.
    """
    results = []
    for command_line in command_lines:
        rows: list[list[str]] = []
        weights: dict[str, str] = {}
        with (
            mock.patch.object(Loader, "step", _recording_rows(Loader.step, rows)),
            mock.patch.object(pretrain, "initialize_weights", _recording_weights(weights)),
        ):
            loss = pretrain.pretrain(parse_pretrain(command_line), PictureSampler)
        children = len(multiprocessing.active_children())
        results.append({"validation_loss": loss, "rows": rows, "weights": weights, "children": children})
    shut_down()
    return results


def train_with_unmarked_norms(command_lines: list[list[str]]) -> list[dict[str, Any]]:
    """`train` with a fault: under sequence parallelism the gradients of norms are not summed."""

    class UnmarkedNorm(RMSNorm):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            self.weight.sequence_parallel = False

    with mock.patch("megatron_codec.model.llama.RMSNorm", UnmarkedNorm):
        return train(command_lines)


def train_and_die_in_save(command_line: list[str], iteration: int) -> None:
    """`train`, killed while it saves `iteration`, when the tensors are written and the description is not."""

    def write_json(path, value):
        if value["iteration"] == iteration:
            os.kill(os.getpid(), signal.SIGKILL)
        files.write_json(path, value)

    with mock.patch.object(checkpoint, "write_json", write_json):
        train([command_line])


def generate(
    checkpoint_folder: str,
    layouts: list[dict[str, int]],
    prompts: list[list[int]],
    sampling: dict[str, Any],
    **options: int,
) -> list[list[dict[str, Any]]]:
    """What an engine of each layout samples in one world of processes.

    Args:
        layouts: TP and PP, fields of `EngineConfig`.
        sampling, options: arguments of `Sampling`, and other fields of `EngineConfig`.
    """
    results = []
    for layout in layouts:
        engine = Engine.load(checkpoint_folder, EngineConfig(**layout, **options))
        completions = engine.generate(prompts, Sampling(**sampling))
        results.append(
            [{"ids": c.token_ids, "logprobs": c.logprobs, "reason": c.finish_reason} for c in completions]
        )
    shut_down()
    return results


def logits(checkpoint_folders: list[str], layouts: list[dict[str, int]], ids: list[int]) -> list[Any]:
    """Logits after each of `ids`, [checkpoint][token][id], of checkpoints each under its layout.

    Only the process that leads has them; the others give None in their place.
    """
    results = []
    for folder, layout in zip(checkpoint_folders, layouts, strict=True):
        engine = Engine.load(folder, EngineConfig(**layout, cache_tokens=1024))
        seen: list[Tensor] = []

        def record(part, rows, seen=seen):
            seen.append(rows)

        with mock.patch.object(engine.drawing, "score_prompt", record):
            engine.generate([ids], Sampling(prompt_logprobs=True, max_tokens=0))
        results.append(torch.cat(seen)[:, : engine.tokenizer.num_tokens].tolist() if seen else None)
    shut_down()
    return results


def hash_of(tensor: Tensor) -> str:
    """Of the values of a tensor."""
    return hashlib.sha256(tensor.detach().float().contiguous().numpy().tobytes()).hexdigest()


def of_all_ranks(part: Tensor, layout: Layout) -> Tensor:
    """The whole sequences, [b, s], of which each context-parallel rank has [b, s / CP]."""
    parts = [torch.empty_like(part) for _ in range(layout.cp)]
    torch.distributed.all_gather(parts, part, group=layout.groups.cp)
    length = part.shape[1] * layout.cp
    whole = part.new_empty(len(part), length)
    for rank, found in enumerate(parts):
        whole[:, context_parallel_positions(length, layout.cp, rank, part.device)] = found
    return whole


def _recording_rows(microbatches, rows: list[list[str]]):
    def recorded(loader, *args):
        if torch.is_grad_enabled():
            rows.append([])
        for batch in microbatches(loader, *args):
            if torch.is_grad_enabled():
                whole = [of_all_ranks(batch[name], loader._layout) for name in ("tokens", "labels")]
                rows[-1] += map(hash_of, torch.cat(whole, dim=1))
            yield batch

    return recorded


def _recording_weights(weights: dict[str, str]):
    def initialize(module, *args):
        initialize_weights(module, *args)
        weights.update({name: hash_of(parameter) for name, parameter in named_parameters(module)})

    return initialize
