"""The C++ trainer and encoder against Hugging Face `tokenizers` and against the plain definition."""

import random

import numpy as np
import pytest
from tokenizers import Tokenizer as HuggingFace

from megatron_codec.codecs import JpegCodec
from megatron_codec.tokenizer import Tokenizer
from tests.bpe_oracles import (
    as_word,
    hugging_face,
    merges_of,
    plain_encode,
    random_document,
    random_merges,
)
from tests.data_sources import photo_crops


@pytest.fixture(scope="module")
def streams() -> list[bytes]:
    return [JpegCodec().encode(crop) for crop in photo_crops(60)]


@pytest.mark.parametrize("vocab_size", [256, 320, 512, 1024])
def test_merges_and_ids_equal_hugging_face_on_real_streams(streams, vocab_size):
    trained_on, others = streams[::2], streams[1::2]
    oracle = hugging_face(trained_on, vocab_size)
    tokenizer = Tokenizer.train(trained_on, vocab_size)
    assert tokenizer.merges == merges_of(oracle)
    assert tokenizer.vocab_size == vocab_size
    for stream in others:
        ids = tokenizer.encode(stream)
        assert ids.dtype == np.uint16
        assert ids.tolist() == oracle.encode(as_word(stream)).ids
        assert tokenizer.decode(ids) == stream


@pytest.mark.parametrize("seed", range(8))
def test_merges_and_ids_equal_hugging_face_on_random_corpora(seed):
    rng = random.Random(seed)
    for _ in range(150):
        alphabet = rng.choice([1, 2, 3, 4, 8, 256])
        documents = [random_document(rng, alphabet) for _ in range(rng.randint(1, 8))]
        vocab_size = rng.choice([256, 257, 260, 300, 320])
        max_token_length = rng.choice([None, None, 2, 3, 4, 7])
        oracle = hugging_face(documents, vocab_size, max_token_length)
        tokenizer = Tokenizer.train(documents, vocab_size, max_token_length=max_token_length)
        assert tokenizer.merges == merges_of(oracle), (documents, vocab_size, max_token_length)
        for document in [*documents, random_document(rng, alphabet)]:
            assert_same_ids(tokenizer, oracle, document)


def assert_same_ids(tokenizer: Tokenizer, oracle: HuggingFace, document: bytes) -> None:
    ids = tokenizer.encode(document)
    assert ids.tolist() == oracle.encode(as_word(document)).ids, (document, tokenizer.merges)
    assert tokenizer.decode(ids) == document


@pytest.mark.parametrize("seed", range(4))
def test_hand_made_merges_follow_the_plain_definition(seed):
    rng = random.Random(seed)
    for _ in range(500):
        alphabet = rng.choice([1, 2, 3, 4])
        merges = random_merges(rng, alphabet, rng.randint(0, 12))
        tokenizer = Tokenizer(merges)
        for _ in range(4):
            document = random_document(rng, alphabet, longest=60)
            ids = tokenizer.encode(document)
            assert ids.tolist() == plain_encode(document, merges), (document, merges)
            assert tokenizer.decode(ids) == document


def test_pairs_do_not_reach_across_documents():
    assert Tokenizer.train([b"ab", b"ab", b"ba"], 257).merges == [(97, 98)]
    assert Tokenizer.train([b"a", b"b"] * 9, 257).merges == []


def test_overlapping_pairs_count_and_the_smallest_wins_a_tie():
    assert Tokenizer.train([b"aaa", b"bc"], 257).merges == [(97, 97)]
    assert Tokenizer.train([b"dc", b"cd", b"ca"], 257).merges == [(99, 97)]


def test_training_is_repeatable_and_ignores_the_order_of_documents(streams):
    first = Tokenizer.train(streams, 400)
    assert first.merges == Tokenizer.train(streams, 400).merges
    assert first.merges == Tokenizer.train(streams[::-1], 400).merges


def test_duplicates_and_flat_documents_are_dropped_on_request(streams):
    flat = JpegCodec().encode(np.full((256, 256, 3), 200, np.uint8))
    corpus = [flat, *streams[:5], flat, streams[0]]
    plain = Tokenizer.train(streams[:5], 300)
    dropped = Tokenizer.train(corpus, 300, drop_duplicates=True, drop_flat=True)
    assert dropped.merges == plain.merges != Tokenizer.train(corpus, 300).merges
    assert dropped.trained_on and plain.trained_on
    assert dropped.trained_on["sha256"] == plain.trained_on["sha256"]
    assert (dropped.trained_on["duplicates_dropped"], dropped.trained_on["flat_dropped"]) == (2, 1)


@pytest.mark.parametrize("seed", range(4))
def test_a_vocabulary_is_proper_if_every_token_encodes_to_itself(seed):
    rng = random.Random(seed)
    seen = set()
    for _ in range(400):
        merges = random_merges(rng, rng.choice([1, 2, 3, 4]), rng.randint(0, 12))
        tokenizer = Tokenizer(merges)
        tokens = range(256, tokenizer.vocab_size)
        itself = all(plain_encode(tokenizer.token_bytes(token), merges) == [token] for token in tokens)
        assert tokenizer.proper == itself, merges
        seen.add(itself)
    assert seen == {True, False}


def test_trained_vocabularies_are_proper(streams):
    for vocab_size in (320, 1024):
        assert Tokenizer.train(streams, vocab_size).proper


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 65536, 1_000_000])
@pytest.mark.parametrize("merges", [1, 8, 13, 16])
def test_runs_of_one_byte_under_doubling_merges(size, merges):
    """Long runs need more states than the table has, and are then encoded by the definition."""
    doubling = [(7, 7)] + [(256 + i, 256 + i) for i in range(merges - 1)]
    ids = Tokenizer(doubling).encode(bytes([7]) * size).tolist()
    expected = [255 + merges] * (size >> merges)
    expected += [255 + bit if bit else 7 for bit in reversed(range(merges)) if size >> bit & 1]
    assert ids == expected


def test_documents_encode_alike_whatever_was_encoded_before(streams):
    """The table that the encoder fills must not depend on the documents that filled it."""
    merges = Tokenizer.train(streams, 1024).merges
    first = [Tokenizer(merges).encode(stream).tolist() for stream in streams]
    forward, backward = Tokenizer(merges), Tokenizer(merges)
    assert [forward.encode(stream).tolist() for stream in streams] == first
    assert [backward.encode(stream).tolist() for stream in reversed(streams)] == first[::-1]


def test_a_document_in_pieces_gives_the_same_ids(streams):
    rng = random.Random(0)
    for vocab_size in (257, 320, 1024):
        tokenizer = Tokenizer.train(streams, vocab_size)
        for stream in [*streams[:10], b"", b"\xff", b"\xd9" * 500]:
            encoder = tokenizer.incremental_encoder()
            ids, begin = [], 0
            while begin < len(stream):
                end = begin + rng.choice([0, 1, 2, 7, 100, 5000])
                ids += encoder.encode(stream[begin:end]).tolist()
                begin = end
            ids += encoder.encode(b"", final=True).tolist()
            assert ids == tokenizer.encode(stream).tolist() == tokenizer.encode_to_list(stream)


def test_pieces_are_encoded_before_the_document_ends(streams):
    tokenizer = Tokenizer.train(streams, 320)
    encoder = tokenizer.incremental_encoder()
    early = sum(len(encoder.encode(streams[0][i : i + 100])) for i in range(0, len(streams[0]), 100))
    assert early > 0.99 * len(tokenizer.encode(streams[0]))
