"""What a run trains and is evaluated on: datasets opened, checked against each other, and blended."""

import hashlib
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import numpy as np

from megatron_codec.config import PretrainConfig
from megatron_codec.data import DocumentRows, PackedSamples
from megatron_codec.data.blend import Blend, Samples
from megatron_codec.data.code_length import bits_per_byte, predicted_counts
from megatron_codec.data.opening import Parts, open_alike
from megatron_codec.estimate.flops import token_flops
from megatron_codec.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOut:
    """Rows to evaluate with; the first ones are spread over all datasets."""

    rows: Samples
    num_rows: int
    _counts: dict[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)

    def bits_per_byte(self, nats_per_token: float, num_rows: int, tokenizer: Tokenizer) -> float | None:
        """Bits a byte of payload, from the mean over exactly the tokens of the first `num_rows` rows.

        The rows are read once more for it, the first time that so many are asked for.
        """
        if num_rows not in self._counts:
            rows = min(num_rows, self.num_rows)
            self._counts[num_rows] = predicted_counts(self.rows, rows, tokenizer.num_tokens)
        return bits_per_byte(nats_per_token, self._counts[num_rows], tokenizer.token_bytes)


@dataclass(frozen=True)
class Corpora:
    """Data of a run.

    Attributes:
        train: what is trained on, without end.
        valid, test: what is held out, or None.
        tokens: in one epoch of the training data.
        tokenizer, codec: as in the manifests.
        hash: identifies the training data.
    """

    train: Samples
    valid: HeldOut | None
    test: HeldOut | None
    tokens: int
    tokenizer: dict[str, Any]
    codec: dict[str, Any]
    hash: str

    def with_steps(self, config: PretrainConfig) -> PretrainConfig:
        """The configuration with `train_iters` in the place of `train_samples`, `train_epochs` or
        `train_flops`."""
        training = config.training
        if training.train_epochs is not None:
            samples = Fraction(training.train_epochs) * self.tokens / config.model.seq_length
        elif training.train_samples is not None:
            samples = Fraction(training.train_samples)
        elif training.train_flops is not None:
            rows = config.model.padded_vocab_size(Tokenizer.from_dict(self.tokenizer).num_tokens)
            per_sample = token_flops(config, rows).causal * config.model.seq_length
            samples = Fraction(training.train_flops) / Fraction(per_sample)
        else:
            return config
        iterations = -(-samples // training.global_batch_size)
        steps = max(1, int(iterations))
        resolved = replace(
            training, train_iters=steps, train_samples=None, train_epochs=None, train_flops=None
        )
        return replace(config, training=resolved)


def open_corpora(config: PretrainConfig) -> Corpora:
    """Opens all datasets of a run.

    Raises:
        UserError: a dataset is missing or damaged, or two were made with different tokenizers or codecs.
    """
    data, seq_length = config.data, config.model.seq_length
    if data.mock_data:
        return _mock(config)
    opened = open_alike(data.paths)
    if data.data_path:
        shares = [float(share) for share in data.split.split(",")]
        splits = [(weight, dataset.split(shares)) for weight, dataset in opened["--data-path"]]
        train, valid, test = ([(weight, views[i]) for weight, views in splits] for i in range(3))
    else:
        train, valid, test = (opened.get(f"--{name}-data-path", []) for name in ("train", "valid", "test"))
    first = train[0][1]
    weights = [weight or Fraction(dataset.num_tokens) for weight, dataset in train]
    packed = [PackedSamples(dataset, seq_length, config.training.seed) for _, dataset in train]
    return Corpora(
        train=packed[0] if len(packed) == 1 else Blend(packed, weights),
        valid=_held_out(valid, seq_length),
        test=_held_out(test, seq_length),
        tokens=sum(dataset.num_tokens for _, dataset in train),
        tokenizer=first.manifest.tokenizer,
        codec=first.manifest.codec,
        hash=_hash(train, weights),
    )


def _held_out(parts: Parts, seq_length: int) -> HeldOut | None:
    rows = [DocumentRows(dataset, seq_length) for _, dataset in parts if dataset.num_documents]
    count = sum(each.num_rows for each in rows)
    if not count:
        return None
    # With their sizes as weights, all rows of all datasets come once before any is at its end.
    blend = Blend(rows, [Fraction(each.num_rows) for each in rows])
    return HeldOut(rows[0] if len(rows) == 1 else blend, count)


def _hash(parts: Parts, weights: list[Fraction]) -> str:
    if len(parts) == 1:
        return parts[0][1].manifest.hash
    names = [f"{weight} {dataset.manifest.hash}" for weight, (_, dataset) in zip(weights, parts, strict=True)]
    return hashlib.sha256("\n".join(names).encode()).hexdigest()


class MockSamples:
    """Random tokens, the same for the same seed, to try speed and layouts without a dataset."""

    def __init__(self, seq_length: int, num_tokens: int, seed: int):
        self.seq_length, self._num_tokens, self._seed = seq_length, num_tokens, seed

    def sample(self, index: int) -> np.ndarray:
        """See `Samples`."""
        words = np.random.Philox(key=self._seed, counter=[0, 0, index, 0]).random_raw(self.seq_length + 1)
        return (words % self._num_tokens).astype(np.int64)


def _mock(config: PretrainConfig) -> Corpora:
    tokenizer = Tokenizer([(i, i) for i in range(64)])  # the paper's 320 entries, whatever they are
    seed, seq_length = config.training.seed, config.model.seq_length
    return Corpora(
        train=MockSamples(seq_length, tokenizer.num_tokens, seed),
        valid=None,
        test=None,
        tokens=config.training.global_batch_size * config.training.train_iters * seq_length,
        tokenizer=tokenizer.to_dict(),
        codec={"name": "mock", "settings": {}},
        hash="mock",
    )
