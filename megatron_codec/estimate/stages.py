"""One stage of the pipeline: its parameters, its memory under each recomputation, and what it sends."""

from dataclasses import dataclass, replace
from typing import Literal

from megatron_codec.config import PretrainConfig
from megatron_codec.estimate.memory import Memory, layer_parameters, memory
from megatron_codec.estimate.pipeline import pieces
from megatron_codec.estimate.traffic import traffic


@dataclass(frozen=True)
class Stage:
    """One pipeline stage, on one of its tensor- and context-parallel GPUs.

    Attributes:
        parameters: on this GPU, by component.
        in_flight: micro-batches whose activations are held at once; with virtual stages, each counted once
            for every piece of the model that it has passed through.
        memory: with the recomputation that the configuration asks for.
        without_recompute, with_recompute: memory with none, and with every layer recomputed.
        traffic: bytes that this GPU sends in a step, by kind.
    """

    parameters: dict[str, int]
    in_flight: int
    memory: Memory
    without_recompute: Memory
    with_recompute: Memory
    traffic: dict[str, int]


def stage(config: PretrainConfig, number: int, dp: int, rows: int, on_cpu: bool) -> Stage:
    """Stage `number` of the pipeline, for `dp` data-parallel processes and `rows` of the embedding."""
    tp = config.parallel.tensor_model_parallel_size
    held, h = pieces(config, number, config.training.num_microbatches(dp)), config.model.hidden_size
    parameters = {
        "embedding": rows * h // tp if held.first else 0,
        "layers": held.num_layers * sum(layer_parameters(config, tp)),
        "final norm and output": h + rows * h // tp if held.last else 0,
    }
    count = sum(parameters.values())

    def under(config: PretrainConfig) -> Memory:
        return memory(config, held, count, dp * config.parallel.context_parallel_size, rows, on_cpu)

    return Stage(
        parameters=parameters,
        in_flight=len(held.in_flight),
        memory=under(config),
        without_recompute=under(_recomputing(config, None)),
        with_recompute=under(_recomputing(config, "full")),
        traffic=traffic(config, number, dp, count, on_cpu),
    )


def chosen_recomputation(config: PretrainConfig) -> str:
    """`none` or `full` where the run's own choice comes to that, else `chosen`."""
    if _recomputing(config, None).training == config.training:
        return "none"
    if _recomputing(config, "full").training == config.training:
        return "full"
    return "chosen"


def _recomputing(config: PretrainConfig, granularity: Literal["full"] | None) -> PretrainConfig:
    """The same run without recomputation, or with that of every layer."""
    training = replace(
        config.training,
        recompute_granularity=granularity,
        recompute_method=None,
        recompute_num_layers=None,
    )
    return replace(config, training=training)
