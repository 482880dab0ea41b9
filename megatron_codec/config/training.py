"""Batch, precision, recomputation, optimizer and schedule, as flags. A group of `PretrainConfig`."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron_codec.errors import UserError, divisors, out_of_range


@dataclass(frozen=True)
class TrainingConfig:
    """Batch, schedule and optimizer."""

    micro_batch_size: int = 1
    """Sequences that one process computes at once."""
    global_batch_size: int = 1
    """Sequences in one step, over all processes; what is above micro-batch-size x DP is accumulated."""
    train_iters: int = 1000
    """Steps to train for, counted from the very start."""
    train_samples: int | None = None
    """Sequences to train for, instead of --train-iters."""
    train_epochs: float | None = None
    """Passes over the training data to train for, instead of --train-iters."""
    train_flops: float | None = None
    """Floating-point operations to train for, instead of --train-iters, so that models of other sizes, codecs
    or contexts get as much computation; counted as Megatron-LM does, with the causal half of attention."""
    lr: float = 3e-4
    """Highest learning rate."""
    min_lr: float = 3e-5
    """Learning rate at the end of the decay."""
    lr_decay_style: Literal["cosine", "linear", "constant", "WSD"] = "cosine"
    """Shape of the decay; WSD (warm-up, stable, decay) is constant but for its end."""
    lr_wsd_decay_style: Literal["exponential", "linear", "cosine", "minus_sqrt"] = "exponential"
    """Shape of the decay at the end of WSD."""
    lr_wsd_decay_iters: int | None = None
    """Steps of the decay at the end of WSD."""
    lr_decay_iters: int | None = None
    """Steps until --min-lr is reached; --train-iters by default."""
    lr_warmup_iters: int = 0
    """Steps of linear warm-up."""
    weight_decay: float = 0.1
    """Decoupled weight decay of matrices; norms have none."""
    adam_beta1: float = 0.9
    """First coefficient of Adam."""
    adam_beta2: float = 0.95
    """Second coefficient of Adam."""
    adam_eps: float = 1e-8
    """Epsilon of Adam."""
    clip_grad: float = 1.0
    """Largest global norm of the gradient; 0 switches clipping off."""
    bf16: bool = False
    """Compute in bfloat16, with fp32 gradients and fp32 main weights."""
    recompute_granularity: Literal["full", "selective"] | None = None
    """Recompute activations in the backward pass: `full` whole layers, `selective` parts of each."""
    recompute_method: Literal["uniform", "block"] | None = None
    """Of `full`: `uniform` keeps the input of every N-th layer (the default), `block` recomputes N layers of
    each pipeline stage and keeps the others whole."""
    recompute_num_layers: int | None = None
    """The N of the method; 1 by default."""
    recompute_modules: tuple[Literal["core_attn", "mlp", "layernorm"], ...] = ("core_attn",)
    """Of `selective`. Attention that keeps no s x s matrix gains nothing from core_attn; mlp saves most."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""

    @property
    def steps_depend_on_data(self) -> bool:
        """Whether `train_iters` is only known once the data are open (`Corpora.with_steps`)."""
        return (self.train_samples, self.train_epochs, self.train_flops) != (None, None, None)

    def num_microbatches(self, dp: int) -> int:
        """Micro-batches that each process accumulates in a step."""
        return self.global_batch_size // (self.micro_batch_size * dp)

    def recompute_faults(self, layers: int) -> Iterator[UserError]:
        """Recomputation that contradicts itself, or does not fit a piece of the model of `layers` layers."""
        granularity, method, number = (
            self.recompute_granularity,
            self.recompute_method,
            self.recompute_num_layers,
        )
        for flag, value in (("method", method), ("num-layers", number)):
            if value is not None and granularity != "full":
                yield UserError(
                    f"--recompute-{flag} {value}",
                    "goes with --recompute-granularity full",
                    "leave it out, or add --recompute-granularity full",
                )
                return
        if number is not None and not 1 <= number <= layers:
            yield UserError(
                f"--recompute-num-layers {number}",
                f"must lie between 1 and the {layers} layers of a pipeline stage (or of its virtual stages)",
                "leave it out for 1",
            )
        elif number is not None and method != "block" and layers % number:
            yield UserError(
                f"--recompute-num-layers {number}",
                f"must divide the {layers} layers of a pipeline stage (or of its virtual stages)",
                f"use one of {divisors(layers, 64)}, or --recompute-method block",
            )

    def faults(self, dp: int) -> Iterator[UserError]:
        """What is out of range, and a batch that does not divide among `dp` data-parallel processes."""
        wrong = [
            *out_of_range(self, 1, "micro_batch_size", "global_batch_size", "train_iters", "lr_decay_iters"),
            *out_of_range(self, 1, "train_samples", "lr_wsd_decay_iters"),
            *out_of_range(self, 0, "train_epochs", "train_flops"),
            *out_of_range(self, 0, "lr", "min_lr", "lr_warmup_iters"),
            *out_of_range(self, 0, "weight_decay", "adam_eps", "clip_grad"),
            *out_of_range(self, 0, "adam_beta1", "adam_beta2", below=1),
            *out_of_range(self, 0, "seed", below=2**32),
        ]
        yield from wrong
        if wrong:
            return
        together = self.micro_batch_size * dp
        if self.global_batch_size % together:
            yield UserError(
                f"--global-batch-size {self.global_batch_size}",
                f"must be a multiple of --micro-batch-size {self.micro_batch_size} x DP {dp} = {together}",
                f"use {-(-self.global_batch_size // together) * together}",
            )
        if self.min_lr > self.lr:
            yield UserError(
                f"--min-lr {self.min_lr}", f"must not be above --lr {self.lr}", f"use {self.lr / 10:g}"
            )
        lengths = {
            "--train-samples": self.train_samples,
            "--train-epochs": self.train_epochs,
            "--train-flops": self.train_flops,
        }
        given = [f"{flag} {value}" for flag, value in lengths.items() if value is not None]
        if len(given) > 1:
            yield UserError(
                " ".join(given), "only one of them can say when training ends", "leave the others out"
            )
        if self.lr_decay_iters is None and self.steps_depend_on_data:
            return  # how many steps that is, the data says; `Corpora.with_steps` has it checked then
        decay = self.lr_decay_iters or self.train_iters
        if self.lr_decay_style == "WSD" and not 1 <= (self.lr_wsd_decay_iters or 0) <= decay:
            yield UserError(
                f"--lr-wsd-decay-iters {self.lr_wsd_decay_iters}",
                f"must lie between 1 and the {decay} steps of the schedule for --lr-decay-style WSD",
                f"use {max(1, decay // 10)}",
            )
        if self.lr_warmup_iters >= decay:
            yield UserError(
                f"--lr-warmup-iters {self.lr_warmup_iters}",
                f"must be below the {decay} steps of the decay",
                f"use {decay // 20}",
            )
