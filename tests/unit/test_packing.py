"""Packed training samples and evaluation batches, compared with the obvious serial implementation."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from megatron_codec.data import CodecDataset, DocumentRows, PackedSamples, write_dataset
from megatron_codec.data.packing import epoch_order
from megatron_codec.errors import UserError

CODEC = {"name": "jpeg", "settings": {}}
TOKENIZER = {"hash": "0" * 64}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> CodecDataset:
    rng = np.random.default_rng(5)
    documents = [rng.integers(0, 322, rng.integers(2, 80)).astype(np.uint16) for _ in range(97)]
    prefix = tmp_path_factory.mktemp("data") / "p"
    write_dataset(prefix, documents, CODEC, TOKENIZER)
    return CodecDataset.open(prefix)


def serial_stream(dataset: CodecDataset, seed: int, length: int) -> np.ndarray:
    """The oracle: shuffle, concatenate, epoch after epoch."""
    tokens, epoch = [], 0
    while len(tokens) < length:
        for i in epoch_order(dataset.num_documents, seed, dataset.manifest.hash, epoch):
            tokens += dataset.document(i).tolist()
        epoch += 1
    return np.array(tokens[:length])


@pytest.mark.parametrize("seq_length", [1, 7, 64, 512, 3000, 10000])
def test_samples_are_chunks_of_the_shuffled_stream(dataset, seq_length):
    count = 3 * dataset.num_tokens // seq_length + 2
    stream = serial_stream(dataset, 11, count * seq_length + 1)
    packed = PackedSamples(dataset, seq_length, seed=11)
    for i in range(0, count, max(1, count // 300)):
        sample = packed.sample(i)
        assert sample.dtype == np.int64 and sample.shape == (seq_length + 1,)
        np.testing.assert_array_equal(sample, stream[i * seq_length : (i + 1) * seq_length + 1])
    assert packed.samples_per_epoch == dataset.num_tokens / seq_length


def test_any_sample_can_be_the_first(dataset):
    forward = PackedSamples(dataset, 33, seed=1)
    samples = [forward.sample(i) for i in range(400)]
    for i in reversed(range(400)):
        np.testing.assert_array_equal(PackedSamples(dataset, 33, seed=1).sample(i), samples[i])
    backward = PackedSamples(dataset, 33, seed=1)
    for i in reversed(range(400)):
        np.testing.assert_array_equal(backward.sample(i), samples[i])


def test_views_are_packed_by_themselves(dataset):
    view = dataset.split([3, 1])[1]
    stream = serial_stream(view, 4, 500)
    np.testing.assert_array_equal(PackedSamples(view, 99, seed=4).sample(3), stream[297:397])


def test_order_depends_on_seed_hash_and_epoch_alone():
    base = epoch_order(500, 1, "abc", 0)
    assert sorted(base) == list(range(500))
    np.testing.assert_array_equal(base, epoch_order(500, 1, "abc", 0))
    for other in (
        epoch_order(500, 2, "abc", 0),
        epoch_order(500, 1, "abd", 0),
        epoch_order(500, 1, "abc", 1),
    ):
        assert (base != other).mean() > 0.9


def test_order_is_uniform():
    counts = Counter(tuple(epoch_order(4, seed, "", 0)) for seed in range(4800))
    assert len(counts) == 24
    # Chi-squared with 23 degrees of freedom stays below 58.6 with probability 0.9999.
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 58.6


def test_order_stays_the_same_for_ever():
    # A resumed run relies on it, whatever NumPy is installed by then. Values of Philox 4x64-10.
    assert epoch_order(10, 1234, "hash", 5).tolist() == [3, 0, 4, 5, 9, 6, 1, 8, 7, 2]


def test_memory_stays_at_two_epochs(dataset):
    packed = PackedSamples(dataset, 50, seed=0)
    for i in range(0, 2000, 3):
        packed.sample(i)
        assert len(packed._epochs) <= 2


def test_nothing_to_train_on(dataset):
    with pytest.raises(UserError, match="at least one"):
        PackedSamples(dataset.view(0, 0), 10, seed=0)
    with pytest.raises(UserError, match="sequence length 0"):
        PackedSamples(dataset, 0, seed=0)


@pytest.mark.parametrize("seq_length", [100, 20, 1, 79])
def test_document_rows_predict_every_token_but_bos_once(dataset, seq_length):
    rows, pairs = DocumentRows(dataset, seq_length), Counter()
    for index in range(rows.num_rows):
        tokens = rows.sample(index)
        assert tokens.shape == (seq_length + 1,) and tokens.dtype == np.int64
        pairs.update((left, right) for left, right in pairwise(tokens.tolist()) if right >= 0)
    expected = Counter()
    for i in range(dataset.num_documents):
        expected.update(pairwise(dataset.document(i).tolist()))
    assert pairs == expected


def test_document_rows_keep_the_order_and_end_in_padding(dataset):
    rows = DocumentRows(dataset, 100)
    assert rows.num_rows == dataset.num_documents
    for i in range(rows.num_rows):
        document = dataset.document(i)
        np.testing.assert_array_equal(rows.sample(i)[: len(document)], document)
        assert (rows.sample(i)[len(document) :] == -1).all()
    assert (rows.sample(rows.num_rows) == -1).all()
    assert DocumentRows(dataset.view(0, 0), 100).num_rows == 0
