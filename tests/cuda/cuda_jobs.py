"""What processes on a GPU do; the tests call these through `launch`."""

import sys
from typing import Any

from tests.distributed.kept import pretrain_and_keep


def hide_transformer_engine() -> None:
    """Makes this process one without Transformer Engine; to be called before anything asks for it."""
    sys.modules["transformer_engine"] = None  # type: ignore[assignment]


def train(command_lines: list[list[str]], transformer_engine: bool) -> list[dict[str, Any]]:
    """Runs through the command lines of tools/pretrain.py.

    Returns:
        What the platform says of itself, and the layers of the first attention, once for each run.
    """
    if not transformer_engine:
        hide_transformer_engine()
    from megatron_codec.inference.training_samples import PictureSampler
    from megatron_codec.parallel import PLATFORM, shut_down

    results = []
    for command_line in command_lines:
        models = pretrain_and_keep(command_line, PictureSampler)
        attention = models[0].decoder.layers[0].self_attention
        kinds = {name: type(module).__name__ for name, module in attention.named_children()}
        devices = {parameter.device.type for parameter in models[0].parameters()}
        results.append({"platform": PLATFORM.description, "kinds": kinds, "devices": sorted(devices)})
    shut_down()
    return results


def sample(
    checkpoint_folder: str,
    engines: dict[str, dict[str, Any]],
    prompts: list[list[int]],
    sampling: dict[str, Any],
    greedy: dict[str, Any],
) -> dict[str, Any]:
    """What engines of one checkpoint say of prompts and make of them.

    Args:
        engines: by name, fields of `EngineConfig`.
        sampling, greedy: fields of `Sampling`.

    Returns:
        By name: `device`; `prompt`, log-probabilities of the tokens of each prompt; the `ids` of samples and
        the `greedy` ones.
    """
    from megatron_codec.inference import Engine, EngineConfig, Sampling

    results = {}
    for name, config in engines.items():
        engine = Engine.load(checkpoint_folder, EngineConfig(**config))
        scored = engine.generate(prompts, Sampling(max_tokens=0, prompt_logprobs=True, constrain=False))
        results[name] = {
            "device": str(engine.layout.device.type),
            "prompt": [completion.prompt_logprobs for completion in scored],
            "ids": [completion.token_ids for completion in engine.generate(prompts, Sampling(**sampling))],
            "greedy": [completion.token_ids for completion in engine.generate(prompts, Sampling(**greedy))],
            "valid": [
                completion.media is not None for completion in engine.generate(prompts[:1], Sampling(n=4))
            ],
        }
    return results
