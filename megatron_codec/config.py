"""Configuration: frozen dataclasses whose fields are Megatron's flags and whose docstrings are the help.

`num_layers` is `--num-layers`. A preset (presets.py) gives the defaults; flags replace single values.
Checks that need only the values live here, and all faults of a command line are reported together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Literal

from megatron_codec.config_logging import LoggingConfig
from megatron_codec.errors import UserError, raise_all
from megatron_codec.errors import out_of_range as _out_of_range


@dataclass(frozen=True)
class ModelConfig:
    """Shape of the Llama-2 decoder."""

    num_layers: int = 32
    """Transformer layers."""
    hidden_size: int = 4096
    """Width of the residual stream."""
    ffn_hidden_size: int = 11008
    """Width inside the SwiGLU MLP."""
    num_attention_heads: int = 32
    """Attention heads; each is hidden-size / heads wide."""
    seq_length: int = 12288
    """Context in tokens; training packs documents to this length."""
    norm_epsilon: float = 1e-5
    """Epsilon of RMSNorm."""
    rotary_base: int = 10000
    """Base of the rotary position embedding."""
    init_method_std: float = 0.02
    """Standard deviation of the initial weights; output projections are divided by sqrt(2 x layers)."""
    make_vocab_size_divisible_by: int = 128
    """The embedding is padded to a multiple of this, the same under every layout."""

    def padded_vocab_size(self, num_tokens: int) -> int:
        """Rows of the embedding for a tokenizer of `num_tokens` ids, BOS and EOS included."""
        multiple = self.make_vocab_size_divisible_by
        return -(-num_tokens // multiple) * multiple

    def faults(self, parallel: "ParallelConfig") -> Iterator[UserError]:
        """What is out of range, and what does not divide, in the shape itself and by the parallel layout."""
        yield from _out_of_range(self, 0, "norm_epsilon", "init_method_std")
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
        wrong = list(_out_of_range(self, 1, *sizes, "rotary_base", "make_vocab_size_divisible_by"))
        yield from wrong
        if wrong:
            return
        heads = self.num_attention_heads
        # Sizes below 1 are for the layout itself to report.
        tp = max(1, parallel.tensor_model_parallel_size)
        pp = max(1, parallel.pipeline_model_parallel_size)
        if self.hidden_size % heads:
            yield UserError(
                f"--hidden-size {self.hidden_size}",
                f"must be a multiple of --num-attention-heads {heads}",
                f"use {-(-self.hidden_size // heads) * heads}",
            )
        elif self.hidden_size // heads % 2:
            yield UserError(
                f"--num-attention-heads {heads}",
                f"makes heads {self.hidden_size // heads} wide, and rotary embedding needs an even width",
                "choose another number of heads",
            )
        for flag, value in (
            ("--num-attention-heads", heads),
            ("--ffn-hidden-size", self.ffn_hidden_size),
            ("--make-vocab-size-divisible-by", self.make_vocab_size_divisible_by),
        ):
            if value % tp:
                yield UserError(
                    f"--tensor-model-parallel-size {tp}",
                    f"must divide {flag} {value}",
                    f"use one of {_divisors(value, 64)}",
                )
        if self.num_layers % pp:
            yield UserError(
                f"--pipeline-model-parallel-size {pp}",
                f"must divide --num-layers {self.num_layers}",
                f"use one of {_divisors(self.num_layers, 64)}",
            )
        if parallel.sequence_parallel and self.seq_length % tp:
            yield UserError(
                f"--seq-length {self.seq_length}",
                f"must be a multiple of --tensor-model-parallel-size {tp} under --sequence-parallel",
                f"use {self.seq_length // tp * tp}",
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into (PP)."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence too; needs TP > 1."""
    use_distributed_optimizer: bool = True
    """Spread the optimizer state over the data-parallel processes. Always on (docs/decisions.md)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs --overlap-grad-reduce."""

    def check(self, world_size: int) -> None:
        """Raises:
        UserError: the layout contradicts itself or does not fit `world_size` processes.
        """
        raise_all(list(self.faults(world_size)))

    def faults(self, world_size: int) -> Iterator[UserError]:
        """What contradicts itself, or does not fit `world_size` processes."""
        tp, pp = self.tensor_model_parallel_size, self.pipeline_model_parallel_size
        if tp < 1 or pp < 1:
            yield UserError(
                f"--tensor-model-parallel-size {tp} --pipeline-model-parallel-size {pp}",
                "must both be at least 1",
                "leave a flag out for 1",
            )
        elif world_size % (tp * pp):
            yield UserError(
                f"{world_size} processes",
                f"must be a multiple of TP x PP = {tp} x {pp} = {tp * pp}",
                f"start {-(-world_size // (tp * pp)) * tp * pp} processes (torchrun --nproc-per-node), or "
                "change --tensor-model-parallel-size or --pipeline-model-parallel-size",
            )
        if self.sequence_parallel and tp == 1:
            yield UserError(
                "--sequence-parallel",
                "needs --tensor-model-parallel-size above 1",
                "leave it out, or raise TP",
            )
        if not self.use_distributed_optimizer:
            yield UserError(
                "--no-use-distributed-optimizer",
                "is not supported: checkpoints with and without it do not load into each other",
                "leave it out; with DP=1 nothing is exchanged",
            )
        if self.overlap_param_gather and not self.overlap_grad_reduce:
            yield UserError("--overlap-param-gather", "needs --overlap-grad-reduce", "give both or neither")


@dataclass(frozen=True)
class DataConfig:
    """What is trained on."""

    data_path: tuple[str, ...] = ()
    """Dataset prefixes P (P.bin, P.idx, P.json), or a weight before each: 0.7 A 0.3 B. --split cuts each."""
    split: str = "969,30,1"
    """Shares of --data-path for training, validation and test, by documents in order."""
    train_data_path: tuple[str, ...] = ()
    """Dataset prefixes, or weights and prefixes, for training alone, instead of --data-path."""
    valid_data_path: tuple[str, ...] = ()
    """Dataset prefixes for validation alone, beside --train-data-path."""
    test_data_path: tuple[str, ...] = ()
    """Dataset prefixes for a last evaluation alone, beside --train-data-path."""
    mock_data: bool = False
    """Random tokens instead of a dataset, to try speed and layouts."""
    num_workers: int = 1
    """Threads in each process that read ahead; 0 reads when a micro-batch is due."""

    def faults(self) -> Iterator[UserError]:
        """Datasets that are missing or contradict each other, and shares that are none."""
        given = {
            "--data-path": " ".join(self.data_path),
            "--train-data-path": " ".join(self.train_data_path),
            "--mock-data": "given" if self.mock_data else "",
        }
        if sum(map(bool, given.values())) != 1:
            yield UserError(
                ", ".join(f"{flag} {value or 'not given'}" for flag, value in given.items()),
                "exactly one of them has to be given",
                "make a dataset with tools/preprocess_jpeg.py and give its --output-prefix",
            )
        for flag, values in (
            ("--valid-data-path", self.valid_data_path),
            ("--test-data-path", self.test_data_path),
        ):
            if values and not self.train_data_path:
                yield UserError(
                    f"{flag} {' '.join(values)}",
                    "goes with --train-data-path; --data-path is cut by --split",
                    "give --train-data-path instead of --data-path",
                )
        yield from _out_of_range(self, 0, "num_workers")
        try:
            shares = [float(share) for share in self.split.split(",")]
            good = len(shares) == 3 and min(shares) >= 0 and shares[0] > 0 and sum(shares) < math.inf
        except ValueError:
            good = False
        if not good:
            yield UserError(
                f"--split {self.split}",
                "must be three shares, the first above 0",
                "for instance --split 969,30,1",
            )


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
    recompute_granularity: Literal["full"] | None = None
    """Recompute activations in the backward pass: `full` keeps only the input of each layer."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""

    @property
    def steps_depend_on_data(self) -> bool:
        """Whether `train_iters` is only known once the data are open (`Corpora.with_steps`)."""
        return self.train_samples is not None or self.train_epochs is not None

    def num_microbatches(self, dp: int) -> int:
        """Micro-batches that each process accumulates in a step."""
        return self.global_batch_size // (self.micro_batch_size * dp)

    def faults(self, dp: int) -> Iterator[UserError]:
        """What is out of range, and a batch that does not divide among `dp` data-parallel processes."""
        wrong = [
            *_out_of_range(self, 1, "micro_batch_size", "global_batch_size", "train_iters", "lr_decay_iters"),
            *_out_of_range(self, 1, "train_samples", "lr_wsd_decay_iters"),
            *_out_of_range(self, 0, "train_epochs"),
            *_out_of_range(self, 0, "lr", "min_lr", "lr_warmup_iters"),
            *_out_of_range(self, 0, "weight_decay", "adam_eps", "clip_grad"),
            *_out_of_range(self, 0, "adam_beta1", "adam_beta2", below=1),
            *_out_of_range(self, 0, "seed", below=2**32),
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
        if self.train_samples is not None and self.train_epochs is not None:
            yield UserError(
                f"--train-samples {self.train_samples} --train-epochs {self.train_epochs}",
                "only one of them can say when training ends",
                "leave one out",
            )
        if self.lr_decay_iters is None and (self.train_samples or self.train_epochs) is not None:
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


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str | None = None
    """Folder for checkpoints."""
    load: str | None = None
    """Folder to go on from: its latest checkpoint, written under any layout."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    finetune: bool = False
    """Take only the weights from --load, and start at step 0 with a fresh optimizer."""

    def faults(self) -> Iterator[UserError]:
        """Flags that need another one."""
        yield from _out_of_range(self, 1, "save_interval")
        if self.save_interval is not None and self.save is None:
            yield UserError(
                f"--save-interval {self.save_interval}", "needs --save", "name a folder with --save"
            )
        if self.finetune and self.load is None:
            yield UserError("--finetune", "needs --load", "name the checkpoint whose weights to start from")


@dataclass(frozen=True)
class PretrainConfig:
    """Everything a training run is made of."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def faults(self, world_size: int) -> Iterator[UserError]:
        """Every fault of the configuration for `world_size` processes."""
        model_parallel = self.parallel.tensor_model_parallel_size * self.parallel.pipeline_model_parallel_size
        yield from self.parallel.faults(world_size)
        yield from self.model.faults(self.parallel)
        yield from self.data.faults()
        yield from self.training.faults(max(1, world_size // max(1, model_parallel)))
        yield from self.checkpoint.faults()
        yield from self.logging.faults(
            world_size,
            save=self.checkpoint.save,
            mock_data=self.data.mock_data,
            train_iters=None if self.training.steps_depend_on_data else self.training.train_iters,
        )

    def check(self, world_size: int) -> None:
        """Raises:
        UserError: every fault of the configuration for `world_size` processes, all at once.
        """
        raise_all(list(self.faults(world_size)))


def _divisors(number: int, most: int) -> str:
    return ", ".join(str(d) for d in range(1, min(number, most) + 1) if number % d == 0)
