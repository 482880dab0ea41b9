"""The Tokenizer class: batches, special tokens, its file, and what bad input gets."""

import json
import multiprocessing
import threading

import numpy as np
import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.vocabulary import ForeignIds, identity_hash
from tests.data_sources import photo_crops


@pytest.fixture(scope="module")
def streams() -> list[bytes]:
    return [JpegCodec().encode(crop) for crop in photo_crops(24)] + [b"", b"\xff", b"\xd9" * 40]


@pytest.fixture(scope="module")
def tokenizer(streams) -> Tokenizer:
    return Tokenizer.train(streams, 320, codec=JpegCodec().to_dict())


def test_ids_are_bytes_then_merges_then_bos_and_eos(tokenizer):
    assert (tokenizer.vocab_size, tokenizer.bos, tokenizer.eos, tokenizer.num_tokens) == (320, 320, 321, 322)
    assert [tokenizer.token_bytes(byte) for byte in range(256)] == [bytes([byte]) for byte in range(256)]
    for index, (left, right) in enumerate(tokenizer.merges):
        joined = tokenizer.token_bytes(left) + tokenizer.token_bytes(right)
        assert tokenizer.token_bytes(256 + index) == joined
    assert tokenizer.token_bytes(tokenizer.bos) == tokenizer.token_bytes(tokenizer.eos) == b""


@pytest.mark.parametrize("view", [bytes, bytearray, memoryview, lambda s: np.frombuffer(s, np.uint8)])
def test_documents_may_be_any_contiguous_bytes(tokenizer, streams, view):
    for stream in streams:
        np.testing.assert_array_equal(tokenizer.encode(view(stream)), tokenizer.encode(stream))
    ids, offsets = tokenizer.encode_batch([view(stream) for stream in streams])
    assert tokenizer.decode_batch(ids, offsets) == streams


def test_wider_items_and_gaps_are_refused(tokenizer):
    with pytest.raises(TypeError):
        tokenizer.encode(np.zeros(4, np.uint16))
    with pytest.raises((TypeError, BufferError, ValueError)):
        tokenizer.encode(np.zeros(8, np.uint8)[::2])


@pytest.mark.parametrize("threads", [1, 2, 3, 50])
@pytest.mark.parametrize("add_special_tokens", [False, True])
def test_a_batch_is_its_documents_one_after_the_other(tokenizer, streams, threads, add_special_tokens):
    streams = streams * 20  # threads take 128 KiB at a time
    ids, offsets = tokenizer.encode_batch(streams, threads=threads, add_special_tokens=add_special_tokens)
    assert (ids.dtype, offsets.dtype, len(offsets)) == (np.uint16, np.int64, len(streams) + 1)
    for i, stream in enumerate(streams):
        document = ids[offsets[i] : offsets[i + 1]].tolist()
        if add_special_tokens:
            assert (document[0], document[-1]) == (tokenizer.bos, tokenizer.eos)
            document = document[1:-1]
        assert document == tokenizer.encode(stream).tolist()
    assert tokenizer.decode_batch(ids, offsets) == streams


def test_a_batch_is_written_into_the_callers_buffer(tokenizer, streams):
    size = sum(map(len, streams)) + 2 * len(streams)
    buffer = np.full(size + 10, 7777, np.uint16)
    ids, _ = tokenizer.encode_batch(streams, out=buffer[:size], threads=2, add_special_tokens=True)
    assert np.shares_memory(ids, buffer)
    assert (buffer[size:] == 7777).all()
    with pytest.raises(UserError, match=f"a buffer of {size - 1} ids: has to hold {size}"):
        tokenizer.encode_batch(streams, out=buffer[: size - 1], add_special_tokens=True)
    for wrong in (buffer.astype(np.int32), buffer[::2], buffer.reshape(-1, 1)):
        with pytest.raises(UserError, match="must be a writable one-dimensional uint16 array"):
            tokenizer.encode_batch(streams, out=wrong)
    with pytest.raises(UserError, match="threads 0"):
        tokenizer.encode_batch(streams, threads=0)


def test_an_empty_batch_has_no_ids(tokenizer):
    ids, offsets = tokenizer.encode_batch([])
    assert (len(ids), offsets.tolist()) == (0, [0])
    assert tokenizer.decode_batch(ids, offsets) == []


def test_one_tokenizer_serves_many_threads(tokenizer, streams):
    expected = [tokenizer.encode(stream).tolist() for stream in streams]
    results = {}

    def work(name: int) -> None:
        results[name] = [tokenizer.encode(stream).tolist() for _ in range(5) for stream in streams]

    workers = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(results[name] == expected * 5 for name in range(4))


def test_a_tokenizer_travels_to_other_processes(tokenizer, streams):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        (ids,) = pool.map(tokenizer.encode, streams[:1])
    np.testing.assert_array_equal(ids, tokenizer.encode(streams[0]))


def test_decode_drops_bos_in_front_and_eos_at_the_end(tokenizer, streams):
    ids = tokenizer.encode(streams[0]).tolist()
    bos, eos = tokenizer.bos, tokenizer.eos
    for whole in ([bos, *ids, eos], [bos, *ids], [*ids, eos], np.array([bos, *ids, eos], np.int64)):
        assert tokenizer.decode(whole) == streams[0]
    assert tokenizer.decode([]) == tokenizer.decode([bos]) == tokenizer.decode([bos, eos]) == b""
    for wrong in ([1, bos, 2], [1, eos, 2], [eos, 1], [1, bos], [bos, bos]):
        with pytest.raises(UserError, match="is no token of this vocabulary"):
            tokenizer.decode(wrong)


@pytest.mark.parametrize("ids", [[-1], [322], [70000], [1.5], [2**40], ["a"], [True]])
def test_decode_refuses_what_is_no_id(tokenizer, ids):
    with pytest.raises(UserError, match=r"must be integers|must lie in \[0, 322\)"):
        tokenizer.decode(ids)
    with pytest.raises(UserError, match="id 9999 at position 1: is no token"):
        tokenizer.decode(np.array([1, 9999], np.uint16))


def test_the_file_holds_everything(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    loaded = Tokenizer.load(path)
    assert loaded.to_dict() == tokenizer.to_dict() == json.loads(path.read_text())
    assert loaded.hash == tokenizer.hash
    assert loaded.codec == {
        "name": "jpeg",
        "settings": {"image_size": 256, "quality": 25, "remove_head": False},
    }
    assert set(loaded.trained_on or {}) >= {"sha256", "documents", "bytes"}


def test_the_hash_depends_on_merges_and_codec_and_not_on_the_corpus_record(tokenizer):
    same = Tokenizer(tokenizer.merges, tokenizer.codec)
    assert same.hash == tokenizer.hash
    assert Tokenizer(tokenizer.merges[:-1], tokenizer.codec).hash != tokenizer.hash
    assert Tokenizer(tokenizer.merges, JpegCodec(quality=30).to_dict()).hash != tokenizer.hash


def test_foreign_ids_are_kept(tokenizer, streams, tmp_path):
    permutation = np.random.default_rng(0).permutation(322)
    ids = ForeignIds(tuple(permutation[:320].tolist()), int(permutation[320]), int(permutation[321]), 400)
    foreign = Tokenizer(tokenizer.merges, tokenizer.codec, ids=ids)
    foreign.save(tmp_path / "foreign.json")
    foreign = Tokenizer.load(tmp_path / "foreign.json")
    assert (foreign.bos, foreign.eos, foreign.num_tokens) == (permutation[320], permutation[321], 400)
    for stream in streams:
        encoded = foreign.encode(stream)
        np.testing.assert_array_equal(encoded, permutation[tokenizer.encode(stream)])
        assert foreign.decode([foreign.bos, *encoded, foreign.eos]) == stream
    assert foreign.hash != tokenizer.hash


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        (JpegCodec(quality=30), "quality=25.*does not fit streams of.*quality=30"),
        (JpegCodec(image_size=32), "image_size=256.*does not fit streams of.*image_size=32"),
    ],
)
def test_a_tokenizer_of_other_settings_is_refused(tokenizer, codec, message):
    tokenizer.require_codec(JpegCodec().to_dict())
    with pytest.raises(UserError, match=message):
        tokenizer.require_codec(codec.to_dict())
    with pytest.raises(UserError, match=r"no codec in particular.*does not fit"):
        Tokenizer([]).require_codec(codec.to_dict())


def edited(tokenizer: Tokenizer, rehash: bool = True, **changes) -> dict:
    fields = tokenizer.to_dict() | changes
    if rehash and "merges" in changes:
        fields["vocab_size"] = 256 + len(fields["merges"])
        fields["hash"] = identity_hash(fields["codec"], fields["merges"], None)
    return fields


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"merges": [[1, 2], [1, 2]]}, r"merge 1 \(1, 2\): an earlier merge is the same"),
        ({"merges": [[1, 256]]}, r"merge 0 \(1, 256\): a merge may only use ids below its own, 256"),
        ({"merges": [[1, 2], [900, 1]]}, "ids below its own, 257"),
        ({"merges": [[1, -2]]}, r"merge \[1, -2\]: must be a pair of ids"),
        ({"merges": [[1, 2, 3]]}, "must be a pair of ids"),
        ({"merges": [[1, 65536]]}, "must be a pair of ids"),
        ({"merges": [[1, True]]}, "must be a pair of ids"),
        ({"merges": [[0, 0]] + [[256 + i, 256 + i] for i in range(20)]}, "at most 65536 bytes"),
        ({"vocab_size": 300}, "vocab_size 300: must be 256 and 64 merges"),
        ({"hash": "0" * 64}, "does not fit codec, merges and ids"),
        ({"codec": {"name": "avc", "settings": {}}}, "does not fit codec, merges and ids"),
        ({"codec": "jpeg"}, "codec jpeg: must be null or"),
        ({"version": 2}, "version 2: must be 1"),
        ({"format": "other"}, "must be a JSON object with"),
        ({"surprise": 1}, "field surprise: is missing or unknown"),
        ({"ids": [1, 2]}, "ids: must be null or an object"),
        (
            {"ids": {"tokens": [1], "bos": 2, "eos": 2, "num_tokens": 9, "prefix": []}},
            "must differ from each other",
        ),
        ({"ids": {"tokens": [1], "bos": 2, "eos": 9, "num_tokens": 9, "prefix": []}}, "ids up to 9 of 9"),
        (
            {"ids": {"tokens": [1], "bos": 2, "eos": "x", "num_tokens": 9, "prefix": []}},
            "must be whole numbers",
        ),
    ],
)
def test_a_wrong_field_is_named(tokenizer, tmp_path, changes, message):
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(edited(tokenizer, **changes)))
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.load(path)
    assert str(path) in str(error.value)


def test_a_file_that_is_missing_truncated_or_something_else_is_refused(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="cannot be read: No such file"):
        Tokenizer.load(path)
    with pytest.raises(UserError, match="cannot be read: Is a directory"):
        Tokenizer.load(tmp_path)
    tokenizer.save(path)
    whole = path.read_bytes()
    for size in range(0, len(whole) - 2, 97):
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match="is not a whole JSON file"):
            Tokenizer.load(path)
    for content in (b"[]", b"3", b"\xff\xd8\xff\xe0"):
        path.write_bytes(content)
        with pytest.raises(UserError):
            Tokenizer.load(path)


@pytest.mark.parametrize("vocab_size", [0, 255, 65535])
def test_a_vocabulary_size_out_of_range_is_refused(vocab_size):
    with pytest.raises(UserError, match=f"--vocab-size {vocab_size}: must lie between 256 and 65534"):
        Tokenizer.train([b"ab"], vocab_size)


def test_training_without_documents_is_refused():
    with pytest.raises(UserError, match="0 documents"):
        Tokenizer.train([])
    with pytest.raises(UserError, match="--max-token-length 1"):
        Tokenizer.train([b"ab"], max_token_length=1)


def test_training_can_be_interrupted(streams):
    def interrupted():
        yield from streams
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Tokenizer.train(interrupted())
