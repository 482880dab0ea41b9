"""Shape of the decoder, as flags. A group of `PretrainConfig`."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_codec.config.parallel import ParallelConfig
from megatron_codec.errors import UserError, divisors, out_of_range


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
    max_position_embeddings: int | None = None
    """Longest sequence that the model is meant for, in tokens; of a preset, its own context. The rotary
    embedding has no table to size, so raising it is all that a longer one takes."""
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

    def faults(self, parallel: ParallelConfig) -> Iterator[UserError]:
        """What is out of range, and what does not divide, in the shape itself and by the parallel layout."""
        yield from out_of_range(self, 0, "norm_epsilon", "init_method_std")
        sizes = ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "seq_length")
        wrong = list(
            out_of_range(
                self, 1, *sizes, "max_position_embeddings", "rotary_base", "make_vocab_size_divisible_by"
            )
        )
        yield from wrong
        if wrong:
            return
        heads = self.num_attention_heads
        if self.max_position_embeddings is not None and self.seq_length > self.max_position_embeddings:
            yield UserError(
                f"--seq-length {self.seq_length}",
                f"must be at most --max-position-embeddings {self.max_position_embeddings}",
                f"use {self.max_position_embeddings}, or raise --max-position-embeddings too",
            )
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
                    f"use one of {divisors(value, 64)}",
                )
        if self.num_layers % pp:
            yield UserError(
                f"--pipeline-model-parallel-size {pp}",
                f"must divide --num-layers {self.num_layers}",
                f"use one of {divisors(self.num_layers, 64)}",
            )
        elif self.num_layers % chunks:
            yield UserError(
                f"--num-virtual-stages-per-pipeline-rank {parallel.num_virtual_stages_per_pipeline_rank}",
                f"must divide the {self.num_layers // pp} layers of a pipeline stage",
                f"use one of {divisors(self.num_layers // pp, 64)}",
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
