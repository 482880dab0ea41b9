"""Configuration: frozen dataclasses whose fields are Megatron's flags and whose docstrings are the help.

`num_layers` is `--num-layers`. A preset (presets.py) gives the defaults; flags replace single values.
Checks that need only the values live here, and all faults of a command line are reported together.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib.util import find_spec
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
        cp = max(1, parallel.context_parallel_size)
        chunks = pp * max(1, parallel.num_virtual_stages_per_pipeline_rank)
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
        elif self.num_layers % chunks:
            yield UserError(
                f"--num-virtual-stages-per-pipeline-rank {parallel.num_virtual_stages_per_pipeline_rank}",
                f"must divide the {self.num_layers // pp} layers of a pipeline stage",
                f"use one of {_divisors(self.num_layers // pp, 64)}",
            )
        # Each context-parallel rank holds two pieces of the sequence, which sequence parallelism cuts again.
        pieces = (2 * cp if cp > 1 else 1) * (tp if parallel.sequence_parallel else 1)
        if self.seq_length % pieces:
            reasons = [f"2 x --context-parallel-size {cp}"] if cp > 1 else []
            if parallel.sequence_parallel:
                reasons.append(f"--tensor-model-parallel-size {tp} under --sequence-parallel")
            yield UserError(
                f"--seq-length {self.seq_length}",
                f"must be a multiple of {' x '.join(reasons)}" + (f" = {pieces}" if cp > 1 else ""),
                f"use {max(1, self.seq_length // pieces) * pieces}",
            )


@dataclass(frozen=True)
class ParallelConfig:
    """How the model and the batch are spread over processes."""

    tensor_model_parallel_size: int = 1
    """Processes that share each layer (TP)."""
    pipeline_model_parallel_size: int = 1
    """Stages that the layers are cut into (PP)."""
    num_virtual_stages_per_pipeline_rank: int = 1
    """Pieces of the model that each stage holds, interleaved over the stages, for a shorter wait."""
    context_parallel_size: int = 1
    """Processes that share each sequence (CP)."""
    cp_comm_type: Literal["p2p", "all_gather", "a2a"] = "p2p"
    """How Transformer Engine exchanges keys and values; the attention used without it gathers them."""
    sequence_parallel: bool = False
    """Cut norms and residuals along the sequence too; needs TP > 1."""
    use_distributed_optimizer: bool = True
    """Spread the optimizer state over the data-parallel processes. Always on (docs/decisions.md)."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward pass still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the forward pass already runs; needs --overlap-grad-reduce."""

    @property
    def model_parallel_size(self) -> int:
        """Processes that hold one model together: TP x PP x CP."""
        return (
            self.tensor_model_parallel_size * self.pipeline_model_parallel_size * self.context_parallel_size
        )

    def data_parallel_size(self, world_size: int) -> int:
        """DP among `world_size` processes; at least 1, also where `faults` has something to say."""
        return max(1, world_size // max(1, self.model_parallel_size))

    def check(self, world_size: int) -> None:
        """Raises:
        UserError: the layout contradicts itself or does not fit `world_size` processes.
        """
        raise_all(list(self.faults(world_size)))

    def faults(self, world_size: int) -> Iterator[UserError]:
        """What contradicts itself, or does not fit `world_size` processes."""
        sizes = {
            "tensor_model_parallel_size": self.tensor_model_parallel_size,
            "pipeline_model_parallel_size": self.pipeline_model_parallel_size,
            "context_parallel_size": self.context_parallel_size,
        }
        wrong = list(_out_of_range(self, 1, *sizes, "num_virtual_stages_per_pipeline_rank"))
        yield from wrong
        together = self.model_parallel_size
        if not wrong and world_size % together:
            used = {name: size for name, size in sizes.items() if size > 1}
            flags = [f"--{name.replace('_', '-')} {size}" for name, size in used.items()]
            yield UserError(
                f"{world_size} processes",
                f"must be a multiple of {' x '.join(flags)} = {together}",
                f"start {-(-world_size // together) * together} processes (torchrun --nproc-per-node), or "
                "change the layout",
            )
        pp = self.pipeline_model_parallel_size
        if self.num_virtual_stages_per_pipeline_rank > 1 and pp == 1:
            yield UserError(
                f"--num-virtual-stages-per-pipeline-rank {self.num_virtual_stages_per_pipeline_rank}",
                "needs --pipeline-model-parallel-size above 1",
                "leave it out, or raise PP",
            )
        if self.sequence_parallel and self.tensor_model_parallel_size == 1:
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

    def faults(self, model: ModelConfig, parallel: ParallelConfig, training: "TrainingConfig"):
        """Flags that need another one, and what FP8 cannot compute, of a run that is right without it."""
        yield from _out_of_range(self, 0, "fp8_margin", "num_layers_at_start_in_bf16")
        yield from _out_of_range(self, 0, "num_layers_at_end_in_bf16")
        yield from _out_of_range(self, 1, "fp8_amax_history_len")
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
        self, model: ModelConfig, parallel: ParallelConfig, training: "TrainingConfig"
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
        return self.train_samples is not None or self.train_epochs is not None

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
                f"use one of {_divisors(layers, 64)}, or --recompute-method block",
            )
        if granularity == "selective" and not self.recompute_modules:
            yield UserError(
                "--recompute-modules", "names nothing to recompute", "name some of core_attn, mlp, layernorm"
            )

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
    fp8: Fp8Config = field(default_factory=Fp8Config)
    data: DataConfig = field(default_factory=DataConfig)
    training: TrainingConfig = field(default_factory=TrainingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)

    def faults(self, world_size: int) -> Iterator[UserError]:
        """Every fault of the configuration for `world_size` processes of this machine."""
        yield from self.run_faults(world_size)
        if self.fp8.fp8_format and not self.fp8.fp8_emulation and not find_spec("transformer_engine"):
            yield UserError(
                f"--fp8-format {self.fp8.fp8_format}",
                "needs Transformer Engine, which is not installed",
                "pip install 'megatron_codec[gpu]' on a machine with CUDA, or add --fp8-emulation to try the "
                "recipe without",
            )
        yield from self.data.faults()
        yield from self.checkpoint.faults()
        yield from self.logging.faults(
            world_size,
            save=self.checkpoint.save,
            mock_data=self.data.mock_data,
            train_iters=None if self.training.steps_depend_on_data else self.training.train_iters,
        )

    def run_faults(self, world_size: int) -> Iterator[UserError]:
        """Those of model, layout and training, and of their combination; data and folders left aside."""
        dp = self.parallel.data_parallel_size(world_size)
        each = [
            *self.parallel.faults(world_size),
            *self.model.faults(self.parallel),
            *self.training.faults(dp),
        ]
        yield from each
        if each:
            return
        chunks = (
            self.parallel.pipeline_model_parallel_size * self.parallel.num_virtual_stages_per_pipeline_rank
        )
        yield from self.training.recompute_faults(self.model.num_layers // chunks)
        yield from self.fp8.faults(self.model, self.parallel, self.training)
        if self.logging.sample_interval is not None and (
            self.parallel.num_virtual_stages_per_pipeline_rank > 1
        ):
            yield UserError(
                f"--sample-interval {self.logging.sample_interval}",
                "cannot sample from interleaved stages (--num-virtual-stages-per-pipeline-rank "
                f"{self.parallel.num_virtual_stages_per_pipeline_rank})",
                "leave one of them out; tools/generate.py samples from the checkpoints",
            )
        pp, microbatches = self.parallel.pipeline_model_parallel_size, self.training.num_microbatches(dp)
        if self.parallel.num_virtual_stages_per_pipeline_rank > 1 and microbatches % pp:
            together = self.training.micro_batch_size * dp * pp
            yield UserError(
                f"--global-batch-size {self.training.global_batch_size}",
                f"makes {microbatches} micro-batches, and --num-virtual-stages-per-pipeline-rank needs a "
                f"multiple of --pipeline-model-parallel-size {pp}",
                f"use {-(-self.training.global_batch_size // together) * together}",
            )

    def check(self, world_size: int) -> None:
        """Raises:
        UserError: every fault of the configuration for `world_size` processes, all at once.
        """
        raise_all(list(self.faults(world_size)))


def _divisors(number: int, most: int) -> str:
    return ", ".join(str(d) for d in range(1, min(number, most) + 1) if number % d == 0)
