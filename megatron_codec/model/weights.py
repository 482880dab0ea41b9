"""Names and initial weights that depend on the seed and on nothing of the layout.

Each whole matrix is drawn from a generator of its own, seeded by the run's seed and the parameter's name, and
cut for this process, so every layout starts from the same model.
"""

# Megatron-Core's annotations are narrower than what its own specs put there.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import hashlib
import math
import re
from collections.abc import Iterator

import torch
from megatron.core.models.gpt import GPTModel

from megatron_codec.config import ModelConfig
from megatron_codec.parallel import Layout


@torch.no_grad()
def initialize_weights(module: GPTModel, model: ModelConfig, layout: Layout, seed: int) -> None:
    """Sets this process's cut of the initial weights: normal for matrices, one for norms."""
    output_std = model.init_method_std / math.sqrt(2 * model.num_layers)
    for name, parameter in named_parameters(module):
        if parameter.dim() == 1:
            parameter.fill_(1.0)
            continue
        std = (
            output_std
            if name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            else model.init_method_std
        )
        dim = getattr(parameter, "partition_dim", -1)
        cut = dim >= 0 and layout.tp > 1
        shape = list(parameter.shape)
        if cut:
            shape[dim] *= layout.tp
        generator = torch.Generator(device=parameter.device).manual_seed(_seed_of(seed, name))
        whole = torch.empty(shape, dtype=torch.float32, device=parameter.device)
        whole.normal_(0.0, std, generator=generator)
        if cut:
            # A SwiGLU matrix is [gate; up]: each rank holds its part of both (stride 2).
            stride = 2 if name.endswith("linear_fc1.weight") else 1
            pieces = whole.chunk(stride, dim)
            whole = torch.cat([piece.chunk(layout.tp, dim)[layout.tp_rank] for piece in pieces], dim)
        parameter.copy_(whole)


def named_parameters(module: GPTModel) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """Yields (name, parameter) with the layer's number in the whole model, whatever stage holds it."""
    for name, parameter in module.named_parameters():
        yield global_name(module, name), parameter


def global_name(module: GPTModel, name: str) -> str:
    """The name of a part of this piece of the model with the layer's number in the whole model."""
    offset = int(module.decoder.layers[0].layer_number) - 1
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda number: str(int(number.group()) + offset), name)


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1
