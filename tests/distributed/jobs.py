"""What launched processes do; the tests call these through `launch`."""

import hashlib
import os
import signal
from typing import Any
from unittest import mock

import torch

from megatron_codec import files
from megatron_codec.flags import parse_pretrain
from megatron_codec.model.layers import RMSNorm
from megatron_codec.parallel import shut_down
from megatron_codec.training import checkpoint, step
from megatron_codec.training.pretrain import pretrain


def train(command_lines: list[list[str]]) -> list[dict[str, Any]]:
    """Runs through the command lines of tools/pretrain.py, in one world of processes.

    Returns:
        Of each run its last `validation_loss`, and `rows`: of each iteration, a hash of each sample that
        this rank was trained on, in order.
    """
    results = []
    for command_line in command_lines:
        rows: list[list[str]] = []
        with mock.patch.object(step, "microbatches", _recording(step.microbatches, rows)):
            results.append({"validation_loss": pretrain(parse_pretrain(command_line)), "rows": rows})
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


def _recording(microbatches, rows: list[list[str]]):
    def recorded(*args):
        if torch.is_grad_enabled():
            rows.append([])
        for batch in microbatches(*args):
            if torch.is_grad_enabled():
                for pair in zip(batch["tokens"], batch["labels"], strict=True):
                    rows[-1].append(hashlib.sha256(torch.cat(pair).numpy().tobytes()).hexdigest())
            yield batch

    return recorded
