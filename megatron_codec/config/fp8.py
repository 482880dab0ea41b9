"""FP8 of the layers' matrix products, as flags. A group of `PretrainConfig`."""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from typing import Literal

from megatron_codec.config.model import ModelConfig
from megatron_codec.config.parallel import ParallelConfig
from megatron_codec.config.training import TrainingConfig
from megatron_codec.errors import UserError, out_of_range


@dataclass(frozen=True)
class Fp8Config:
    """Matrix products of the layers in FP8."""

    fp8_format: Literal["e4m3", "hybrid"] | None = None
    """Matrix products of the layers in FP8: all e4m3, or `hybrid`, whose gradients are e5m2."""
    fp8_recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = "delayed"
    """A scale for each tensor from earlier steps (delayed) or its own largest value (tensorwise), or for each
    block of 128 (blockwise, from Hopper on) or of 32 values (mxfp8, from Blackwell on)."""
    fp8_margin: int = 0
    """Powers of two that delayed scaling stays below the largest value."""
    fp8_amax_history_len: int = 1
    """Steps whose largest values delayed scaling remembers."""
    fp8_amax_compute_algo: Literal["most_recent", "max"] = "most_recent"
    """Which of the remembered values gives the scale."""
    fp8_wgrad: bool = True
    """Gradients of weights in FP8 too; without, in the precision of training. Of delayed scaling."""
    first_last_layers_bf16: bool = False
    """Keep the first and the last layers in bf16; not with delayed scaling."""
    num_layers_at_start_in_bf16: int = 1
    """Layers at the start that are kept so."""
    num_layers_at_end_in_bf16: int = 1
    """Layers at the end that are kept so."""
    fp8_emulation: bool = False
    """Emulate FP8 by rounding, on any device, to try a recipe; slower, not faster."""
    fp8_emulation_scaling: bool = True
    """Scale in the emulation; without, values are rounded as they are, to see what scaling is for."""

    @property
    def in_hardware(self) -> bool:
        """Whether matrices are multiplied in FP8, and not only rounded to it."""
        return self.fp8_format is not None and not self.fp8_emulation

    def faults(
        self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig
    ) -> Iterator[UserError]:
        """Flags that need another one, and what FP8 cannot compute, of a run that is right without it."""
        yield from out_of_range(self, 0, "fp8_margin", "num_layers_at_start_in_bf16")
        yield from out_of_range(self, 0, "num_layers_at_end_in_bf16")
        yield from out_of_range(self, 1, "fp8_amax_history_len")
        if self.fp8_format is None:
            for flag, given in (
                ("--fp8-emulation", self.fp8_emulation),
                ("--first-last-layers-bf16", self.first_last_layers_bf16),
            ):
                if given:
                    yield UserError(flag, "needs --fp8-format", "add --fp8-format hybrid")
            return
        if not self.fp8_emulation_scaling and not self.fp8_emulation:
            yield UserError(
                "--no-fp8-emulation-scaling", "goes with --fp8-emulation", "leave it out, or emulate"
            )
        if not self.fp8_emulation:
            if not training.bf16:
                yield UserError(f"--fp8-format {self.fp8_format}", "needs --bf16", "add --bf16")
            yield from self._sizes(model, parallel, training)
        if self.fp8_recipe != "delayed":
            for flag, given in (
                ("--no-fp8-wgrad", not self.fp8_wgrad),
                (f"--fp8-margin {self.fp8_margin}", self.fp8_margin),
                (f"--fp8-amax-history-len {self.fp8_amax_history_len}", self.fp8_amax_history_len > 1),
            ):
                if given:
                    yield UserError(
                        flag,
                        f"means nothing to --fp8-recipe {self.fp8_recipe}",
                        "leave it out, or use --fp8-recipe delayed",
                    )
            stage = model.num_layers // parallel.pipeline_model_parallel_size
            for flag, number in (
                ("start", self.num_layers_at_start_in_bf16),
                ("end", self.num_layers_at_end_in_bf16),
            ):
                if self.first_last_layers_bf16 and number > stage:
                    yield UserError(
                        f"--num-layers-at-{flag}-in-bf16 {number}",
                        f"must be at most the {stage} layers of a pipeline stage",
                        f"use {stage} or less",
                    )
            return
        if self.first_last_layers_bf16:
            yield UserError(
                "--first-last-layers-bf16",
                "is not possible with --fp8-recipe delayed, whose scales are updated for all layers at once",
                "use --fp8-recipe tensorwise",
            )
        if training.recompute_granularity == "selective" and "layernorm" in training.recompute_modules:
            yield UserError(
                "--recompute-modules layernorm",
                "is not possible with --fp8-recipe delayed",
                "leave it out, or use --fp8-recipe tensorwise",
            )

    def _sizes(
        self, model: ModelConfig, parallel: ParallelConfig, training: TrainingConfig
    ) -> Iterator[UserError]:
        """Matrices that Transformer Engine's products in FP8 do not take."""
        tp, multiple = parallel.tensor_model_parallel_size, 32 if self.fp8_recipe == "mxfp8" else 16
        for flag, size in (("hidden-size", model.hidden_size), ("ffn-hidden-size", model.ffn_hidden_size)):
            if size // tp % multiple:
                yield UserError(
                    f"--{flag} {size}",
                    f"must be a multiple of {multiple} x TP = {multiple * tp} for --fp8-format "
                    f"{self.fp8_format} and --fp8-recipe {self.fp8_recipe}",
                    f"use {-(-size // (multiple * tp)) * multiple * tp}",
                )
        tokens = training.micro_batch_size * model.seq_length // parallel.context_parallel_size
        least = 32 if self.fp8_recipe == "mxfp8" else 8
        if tokens % least:
            yield UserError(
                f"--micro-batch-size {training.micro_batch_size} --seq-length {model.seq_length}",
                f"make {tokens} tokens on each process, and --fp8-format {self.fp8_format} needs a multiple "
                f"of {least}",
                "choose another --seq-length",
            )


def transformer_engine_installed() -> bool:
    """Whether it is there, be it hidden from Megatron-Core (`platform.py`) or not."""
    name = "transformer_engine"
    return sys.modules.get(name) is not None or PathFinder.find_spec(name) is not None
