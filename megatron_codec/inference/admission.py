"""What an engine takes: checkpoints that fit its configuration, and requests that can be served at all."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from megatron_codec import parallel
from megatron_codec.errors import UserError, raise_all
from megatron_codec.inference.config import EngineConfig
from megatron_codec.inference.sampling import Sampling
from megatron_codec.training import checkpoint
from megatron_codec.training.checkpoint import Description


def find_checkpoint(folder: str | Path, config: EngineConfig) -> tuple[Path, Description]:
    """The newest checkpoint in a folder and what it says of itself.

    Raises:
        UserError: there is none, or the engine's configuration does not fit it or the number of processes.
    """
    start = checkpoint.latest(folder)
    description = Description.read(start)
    world_size = parallel.world_size_from_environment()
    layout = config.parallel
    faults = [*config.faults(), *layout.faults(world_size), *description.model.faults(layout)]
    processes = config.tensor_model_parallel_size * config.pipeline_model_parallel_size
    if processes > 0 and world_size > processes:
        faults.append(
            UserError(
                f"{world_size} processes",
                f"generation needs TP x PP = {processes}: every process works on the same samples",
                f"start {processes} (torchrun --nproc-per-node), or change the layout",
            )
        )
    raise_all(faults)
    return start, description


def check_request(
    prompt: Sequence[int], sampling: Sampling, num_tokens: int, room: Mapping[str, int], name: str
) -> None:
    """Whether a prompt with its new tokens can be computed.

    Args:
        num_tokens: that there are.
        room: tokens that a sample may have, by what bounds it; the model's context comes first.
        name: of the prompt, for the message.

    Raises:
        UserError: the prompt is empty, has ids that the model does not know, or does not fit.
    """
    for field, ids in ((name, prompt), ("stop_token_ids", sampling.stop_token_ids)):
        unknown = [i for i in ids if not 0 <= i < num_tokens]
        if unknown:
            raise UserError(
                f"{field}: token id {unknown[0]}",
                f"must be an id from 0 to {num_tokens - 1}",
                "encode the prompt with the tokenizer of the checkpoint",
            )
    context = next(iter(room.values()))
    most = context if sampling.max_tokens == 0 else context - 1
    if not 0 < len(prompt) <= most:
        raise UserError(
            f"{name} of {len(prompt)} tokens",
            f"must have at least 1 token and at most {most} in the model's context of {context}",
            "start with BOS; use a smaller ratio",
        )
    wanted = len(prompt) + (1 if sampling.max_tokens is None else sampling.max_tokens)
    for what, most in room.items():
        if wanted > most:
            raise UserError(
                f"max_tokens {sampling.max_tokens} after a prompt of {len(prompt)} tokens",
                f"must not be more than what is left of {what} of {most} tokens",
                f"use {most - len(prompt)}, or leave it out" if most > len(prompt) else "shorten it",
            )
    if sampling.logprobs > num_tokens:
        raise UserError(
            f"logprobs {sampling.logprobs}",
            f"must not be more than the {num_tokens} tokens that there are",
            "use 5",
        )
