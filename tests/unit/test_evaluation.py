"""The numbers and the pictures of a run's report."""

import math
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from megatron_codec.contact_sheet import contact_sheet
from megatron_codec.data import CodecDataset, DocumentRows
from megatron_codec.data.blend import Blend
from megatron_codec.data.code_length import (
    bits_per_byte,
    payload_bytes,
    predicted_counts,
    token_counts,
    unigram_nats,
)
from megatron_codec.errors import UserError
from megatron_codec.evaluation.run_report import write_report
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training.corpora import HeldOut
from tests.tiny import SAVED_AT, STEPS


@pytest.fixture(scope="module")
def datasets(corpus):
    return CodecDataset.open(corpus.train), CodecDataset.open(corpus.valid), Tokenizer.load(corpus.tokenizer)


def ids_of(dataset: CodecDataset) -> list[int]:
    return [int(i) for n in range(dataset.num_documents) for i in dataset.document(n)]


def test_token_counts_are_those_of_a_plain_count(datasets):
    train, _, tokenizer = datasets
    counts = token_counts(train, tokenizer.num_tokens)
    assert dict(Counter(ids_of(train))) == {i: n for i, n in enumerate(counts) if n}


def test_unigram_nats_is_the_mean_code_length_of_each_token(datasets):
    train, test, tokenizer = datasets
    seen, total = Counter(ids_of(train)), len(ids_of(train))
    lengths = [-math.log((seen[i] + 1) / (total + tokenizer.num_tokens)) for i in ids_of(test)]
    counts = [token_counts(dataset, tokenizer.num_tokens) for dataset in (train, test)]
    assert unigram_nats(*counts) == pytest.approx(sum(lengths) / len(lengths), rel=1e-12)


def test_payload_is_what_the_documents_decode_to(datasets):
    _, test, tokenizer = datasets
    special = (tokenizer.bos, tokenizer.eos)
    plain = sum(
        len(tokenizer.decode([int(i) for i in test.document(n) if i not in special]))
        for n in range(test.num_documents)
    )
    counts = token_counts(test, tokenizer.num_tokens)
    assert payload_bytes(counts, tokenizer.token_bytes) == plain
    # One bit a token, spread over the bytes.
    bits = bits_per_byte(math.log(2), counts, tokenizer.token_bytes)
    assert bits == pytest.approx(test.num_tokens / plain)
    counts[:] = 0
    counts[tokenizer.eos] = 1
    assert bits_per_byte(1.0, counts, tokenizer.token_bytes) is None


@pytest.mark.parametrize("seq_length", [160, 50])
def test_bits_a_byte_are_of_exactly_the_tokens_evaluated(datasets, seq_length):
    """A model whose loss on each token is known: its id, in nats."""
    _, test, tokenizer = datasets
    held_out = HeldOut(DocumentRows(test, seq_length), DocumentRows(test, seq_length).num_rows)
    for num_rows in (7, held_out.num_rows, held_out.num_rows + 3):
        nats, tokens, payload = 0, 0, b""
        for index in range(num_rows):
            for label in held_out.rows.sample(index)[1:].tolist():
                if label >= 0:
                    nats, tokens = nats + label, tokens + 1
                    payload += tokenizer.decode([label]) if label < tokenizer.vocab_size else b""
        expected = nats / math.log(2) / len(payload)
        assert held_out.bits_per_byte(nats / tokens, num_rows, tokenizer) == pytest.approx(expected)
    # All of them is what the documents say by themselves, BOS left out.
    counts = token_counts(test, tokenizer.num_tokens)
    counts[tokenizer.bos] = 0
    np.testing.assert_array_equal(
        predicted_counts(held_out.rows, held_out.num_rows, tokenizer.num_tokens), counts
    )
    streams = [tokenizer.decode(test.document(n)) for n in range(test.num_documents)]
    whole = held_out.bits_per_byte(1.0, held_out.num_rows, tokenizer)
    assert whole == pytest.approx(counts.sum() / math.log(2) / sum(map(len, streams)))


def test_bits_a_byte_of_several_datasets_are_over_all_their_documents(datasets):
    train, test, tokenizer = datasets
    rows = [DocumentRows(dataset, 160) for dataset in (train, test)]
    total = sum(each.num_rows for each in rows)
    held_out = HeldOut(Blend(rows, [Fraction(each.num_rows) for each in rows]), total)
    counts = sum(token_counts(dataset, tokenizer.num_tokens) for dataset in (train, test))
    counts[tokenizer.bos] = 0
    expected = bits_per_byte(4.5, counts, tokenizer.token_bytes)
    assert held_out.bits_per_byte(4.5, total, tokenizer) == pytest.approx(expected, rel=1e-12)


def test_a_run_logs_the_bits_of_the_documents_that_it_evaluated(datasets, trained):
    """--eval-iters 2 batches of 8 rows; by hand, document after document."""
    _, test, tokenizer = datasets
    tokens, payload, rows = 0, 0, 16
    for number in range(test.num_documents):
        document = test.document(number)
        for start in range(0, len(document) - 1, 160):
            labels = document[start + 1 : start + 161].tolist()
            if rows > 0:
                tokens += len(labels)
                payload += sum(len(tokenizer.token_bytes(label)) for label in labels)
            rows -= 1
    for iteration in (SAVED_AT, STEPS):
        step = trained.metrics[iteration]
        expected = step["validation_loss"] * tokens / math.log(2) / payload
        assert step["validation_bits_per_byte"] == pytest.approx(expected, rel=1e-12)


def test_contact_sheet_shows_every_pixel_enlarged_by_a_whole_factor():
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)) for _ in range(3)]
    sheet = np.asarray(contact_sheet([[pictures[0], pictures[1]], [None, pictures[2]]], size=96))
    for picture, (left, top) in zip(pictures, [(4, 4), (104, 4), (104, 104)], strict=True):
        assert (sheet[top + 1 : top + 96 : 3, left + 1 : left + 96 : 3] == np.asarray(picture)).all()
    assert len(np.unique(sheet[104:200, 4:100].reshape(-1, 3), axis=0)) == 2, (
        "a missing sample is crossed out"
    )


def test_titles_of_a_contact_sheet_are_broken_into_lines_and_none_is_cut():
    pictures = [Image.new("RGB", (32, 32), "blue")] * 2

    def heading(*titles):
        sheet = np.asarray(contact_sheet([pictures], titles, size=96))
        return sheet[: len(sheet) - 104]

    long, longer = "model (jpeg), top-k 40, top-p 0.9", "model (jpeg), top-k 80, top-p 0.9"
    assert len(heading("a", "b")) < len(heading(long, "b"))
    assert heading(long).shape == heading(longer).shape and (heading(long) != heading(longer)).any()
    assert (heading(long, "b")[:, 100:104] == 250).all(), "between two columns"
    unbroken = heading("w" * 40, "b")
    assert len(unbroken) > 30 and (unbroken[:, 100:104] == 250).all()


def test_report_of_an_unfinished_run_says_what_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl.*quickstart"):
        write_report(tmp_path)
