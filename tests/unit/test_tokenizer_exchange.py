"""Vocabularies to and from Hugging Face `tokenizers` and SentencePiece, against both libraries."""

import json
import random

import pytest
import sentencepiece
from tokenizers import Tokenizer as HuggingFace

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.exchange import (
    CHARACTERS,
    export_hugging_face,
    import_hugging_face,
    import_sentencepiece,
    to_text,
)
from megatron_codec.tokenizer.sentencepiece import read_model
from tests.bpe_oracles import hugging_face, random_document, random_merges
from tests.data_sources import photo_crops
from tests.public_model import sentencepiece_model

EDGES = [b"", b"\x00", b"\xff", b"\x00" * 100, bytes(range(256)), b"\xff\xd9"]


@pytest.fixture(scope="module")
def streams() -> list[bytes]:
    return [JpegCodec().encode(crop) for crop in photo_crops(40)]


@pytest.mark.parametrize("vocab_size", [256, 320, 1024])
def test_exported_ids_equal_ours(streams, vocab_size, tmp_path):
    path = tmp_path / "tokenizer.json"
    ours = Tokenizer.train(streams[::2], vocab_size)
    export_hugging_face(ours, path)
    theirs = HuggingFace.from_file(str(path))
    assert theirs.get_vocab_size() == ours.num_tokens
    for stream in [*streams, *EDGES]:
        ids = ours.encode(stream).tolist()
        assert theirs.encode(to_text(stream), add_special_tokens=False).ids == ids
        assert theirs.encode(to_text(stream)).ids == [ours.bos, *ids, ours.eos]
        assert theirs.decode(ids) == to_text(stream)
    assert import_hugging_face(path).to_dict() == Tokenizer(ours.merges).to_dict()


def test_improper_vocabularies_are_exported_too(tmp_path):
    rng = random.Random(1)
    path = tmp_path / "tokenizer.json"
    improper = 0
    for _ in range(60):
        ours = Tokenizer(random_merges(rng, 3, 10))
        names = [ours.token_bytes(token) for token in range(ours.vocab_size)]
        if len(set(names)) < len(names):
            with pytest.raises(UserError, match="two tokens for the same bytes"):
                export_hugging_face(ours, path)
            continue
        improper += not ours.proper
        export_hugging_face(ours, path)
        theirs = HuggingFace.from_file(str(path))
        for _ in range(10):
            document = random_document(rng, 3)
            ids = theirs.encode(to_text(document), add_special_tokens=False).ids
            assert ids == ours.encode(document).tolist()
    assert improper > 5


def test_ids_of_a_hugging_face_tokenizer_are_kept(streams, tmp_path):
    """Special tokens first, then a vocabulary in the order of its trainer."""
    path = tmp_path / "tokenizer.json"
    fields = json.loads(hugging_face(streams[::2], 400).to_str())
    shifted = {name: id + 3 for name, id in fields["model"]["vocab"].items()}
    special = {"<unk>": 0, "<s>": 1, "</s>": 2}
    fields["model"]["vocab"] = special | shifted
    path.write_text(json.dumps(fields))
    theirs, ours = HuggingFace.from_file(str(path)), import_hugging_face(path)
    assert (ours.bos, ours.eos, ours.num_tokens, ours.vocab_size) == (1, 2, 403, 400)
    for stream in [*streams, *EDGES]:
        assert ours.encode(stream).tolist() == theirs.encode(to_text(stream)).ids
        assert ours.decode([ours.bos, *ours.encode(stream), ours.eos]) == stream
    export_hugging_face(ours, path)
    assert import_hugging_face(path).hash == ours.hash


@pytest.mark.parametrize(("vocab_size", "add_dummy_prefix"), [(323, False), (323, True), (1024, False)])
def test_ids_of_a_sentencepiece_model_are_kept(streams, vocab_size, add_dummy_prefix, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(streams[::2], vocab_size, add_dummy_prefix=add_dummy_prefix))
    theirs, ours = sentencepiece.SentencePieceProcessor(str(path)), import_sentencepiece(path)
    assert (ours.bos, ours.eos, ours.num_tokens) == (theirs.bos_id(), theirs.eos_id(), len(theirs))
    assert bool(ours.prefix) == add_dummy_prefix
    for stream in [*streams, *EDGES]:
        ids = theirs.encode(to_text(stream))
        assert ours.encode(stream).tolist() == ours.encode_to_list(stream) == ids
        assert ours.decode(ids) == ours.decode([ours.bos, *ids, ours.eos]) == stream
    ids, offsets = ours.encode_batch([*streams, *EDGES], add_special_tokens=True, threads=2)
    assert ours.decode_batch(ids, offsets) == [*streams, *EDGES]
    assert ids[: offsets[1]].tolist() == [ours.bos, *theirs.encode(to_text(streams[0])), ours.eos]

    encoder = ours.incremental_encoder()
    pieces = [encoder.encode(streams[0][i : i + 7]) for i in range(0, len(streams[0]), 7)]
    pieces.append(encoder.encode(b"", final=True))
    assert [id for piece in pieces for id in piece.tolist()] == theirs.encode(to_text(streams[0]))

    ours.save(tmp_path / "ours.json")
    assert Tokenizer.load(tmp_path / "ours.json").hash == ours.hash
    export_hugging_face(ours, tmp_path / "tokenizer.json")
    assert import_hugging_face(tmp_path / "tokenizer.json").hash == ours.hash
    exported = HuggingFace.from_file(str(tmp_path / "tokenizer.json"))
    for stream in streams:
        ids = theirs.encode(to_text(stream))
        assert exported.encode(to_text(stream), add_special_tokens=False).ids == ids
        assert exported.decode(ids) == to_text(stream)


def test_a_codec_given_at_import_is_kept(streams, tmp_path):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(sentencepiece_model(streams[:5], 300))
    import_sentencepiece(path, JpegCodec().to_dict()).require_codec(JpegCodec().to_dict())


def test_sentencepiece_models_that_do_not_fit_are_refused(streams, tmp_path):
    path = tmp_path / "tokenizer.model"
    small = [JpegCodec(image_size=32).encode(crop) for crop in photo_crops(40, size=32)]
    cases = [
        (sentencepiece_model(streams[:5], 259, model_type="unigram"), "must be 2, byte-pair encoding"),
        (sentencepiece_model(streams[:5], 300, bos_id=-1), "BOS id -1: must be the id of a piece"),
        (sentencepiece_model(small, 400, add_dummy_prefix=True), "joins the dummy prefix with bytes"),
    ]
    for model, message in cases:
        path.write_bytes(model)
        with pytest.raises(UserError, match=message):
            import_sentencepiece(path)
    with pytest.raises(UserError, match="cannot be read"):
        import_sentencepiece(tmp_path / "missing.model")


def test_no_bytes_crash_the_reader_of_sentencepiece_models(streams):
    model = sentencepiece_model(streams[:5], 300)
    rng = random.Random(0)
    for size in range(0, len(model), len(model) // 100):
        damaged = bytearray(model[:size])
        for _ in range(rng.choice([0, 1, 5])):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        try:
            read_model(bytes(damaged))
        except ValueError:
            continue


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": {"type": "WordPiece"}}, 'must be a tokenizer.json with a model of type "BPE"'),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "pre_tokenizer .* a document has to be one word"),
        ({"normalizer": {"type": "NFKC"}}, "normalizer .* a document has to be one word"),
        ({"added_tokens": []}, "'<s>': is missing"),
        ({"dropout": 0.1}, "dropout 0.1: is not supported"),
        ({"merges": [["\u2801", "\u2802"]], "vocab": {}}, "makes a token without an id"),
        ({"merges": [["\u2801\u2802", "\u2803"]]}, "joins what no byte or earlier merge gives"),
        ({"merges": [["x", "y"]]}, "joins what no byte or earlier merge gives"),
    ],
)
def test_hugging_face_tokenizers_that_do_not_fit_are_refused(change, message, tmp_path):
    path = tmp_path / "tokenizer.json"
    export_hugging_face(Tokenizer([]), path)
    fields = json.loads(path.read_text())
    for name, value in change.items():
        if name in ("dropout", "merges"):
            fields["model"][name] = value
        elif name == "vocab":
            fields["model"]["vocab"] |= value
        else:
            fields[name] = value
    path.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message):
        import_hugging_face(path)


def test_a_second_merge_for_a_token_is_ignored_where_it_can_never_apply(tmp_path):
    """As in conversions from SentencePiece, which list every way to make a token."""
    path = tmp_path / "tokenizer.json"

    def fields_of(tokenizer: Tokenizer, repeated: list[str]) -> str:
        export_hugging_face(tokenizer, path)
        fields = json.loads(path.read_text())
        fields["model"]["merges"].append(repeated)
        return json.dumps(fields)

    bc, abc = CHARACTERS[2] + CHARACTERS[3], "".join(CHARACTERS[1:4])
    proper = Tokenizer([(1, 2), (2, 3), (256, 3)])
    path.write_text(fields_of(proper, [CHARACTERS[1], bc]))
    assert import_hugging_face(path).merges == proper.merges
    assert HuggingFace.from_file(str(path)).encode(abc, add_special_tokens=False).tokens == [abc]

    improper = Tokenizer([(2, 3), (1, 2), (257, 3)])  # a b c is always a bc, until the second merge comes
    path.write_text(fields_of(improper, [CHARACTERS[1], bc]))
    assert HuggingFace.from_file(str(path)).encode(abc, add_special_tokens=False).tokens == [abc]
    with pytest.raises(UserError, match="two merges for one token, and either may apply"):
        import_hugging_face(path)
