"""Vocabularies of other libraries, over one character a byte: U+2800 + byte, as in the paper's public script.

export_hugging_face(tokenizer, "tokenizer.json")       # for transformers and vLLM; the ids are ours
tokenizer = import_hugging_face("tokenizer.json")      # the ids are those of the file
tokenizer = import_sentencepiece("tokenizer.model")    # such as comes with the public JPEG-LM weights
"""

import os
from itertools import pairwise
from pathlib import Path
from typing import Any

from megatron_codec.errors import UserError
from megatron_codec.files import write_json
from megatron_codec.tokenizer.bpe import Tokenizer
from megatron_codec.tokenizer.sentencepiece import BPE, NORMAL, read_model
from megatron_codec.tokenizer.vocabulary import NUM_BYTES, ForeignIds, Merge, read_vocabulary

FIRST_CHARACTER = 0x2800
CHARACTERS = [chr(FIRST_CHARACTER + byte) for byte in range(NUM_BYTES)]
DUMMY_PREFIX = "\u2581"  # SentencePiece's sign for a space, put before a text


def to_text(stream: bytes) -> str:
    """One character a byte."""
    return stream.decode("latin-1").translate({byte: FIRST_CHARACTER + byte for byte in range(NUM_BYTES)})


def export_hugging_face(tokenizer: Tokenizer, path: str | os.PathLike, add_eos: bool = True) -> None:
    """Writes a `tokenizer.json` that gives the same ids for `to_text(stream)`, between BOS and EOS if special
    tokens are asked for.

    Args:
        add_eos: False for generation, where a text is a prompt: special tokens are then BOS in front alone.

    Raises UserError if two tokens stand for the same bytes, which that format cannot say.
    """
    names = list(CHARACTERS)
    for left, right in tokenizer.merges:
        names.append(names[left] + names[right])
    if len(set(names)) < len(names):
        raise UserError(
            "the vocabulary", "has two tokens for the same bytes, which tokenizer.json cannot hold"
        )
    ids = tokenizer.ids.tokens if tokenizer.ids else range(tokenizer.vocab_size)
    vocab = dict(zip(names, ids, strict=True))
    special = {"<s>": tokenizer.bos, "</s>": tokenizer.eos}
    if tokenizer.prefix:
        vocab[DUMMY_PREFIX] = tokenizer.prefix[0]
    if tokenizer.ids:  # otherwise they follow the vocabulary, as added tokens do
        vocab |= special
    strip = {"type": "Strip", "content": DUMMY_PREFIX, "start": 1, "stop": 0}
    around = [_template("SpecialToken", "<s>"), _template("Sequence", "A"), _template("SpecialToken", "</s>")]
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    write_json(
        path,
        {
            "version": "1.0",
            "truncation": None,
            "padding": None,
            "added_tokens": [{"id": id, "content": name, **plain} for name, id in special.items()],
            "normalizer": {"type": "Prepend", "prepend": DUMMY_PREFIX} if tokenizer.prefix else None,
            "pre_tokenizer": None,
            "post_processor": {
                "type": "TemplateProcessing",
                "single": around if add_eos else around[:2],
                "pair": [_template("Sequence", "A"), _template("Sequence", "B")],
                "special_tokens": {
                    name: {"id": name, "ids": [id], "tokens": [name]} for name, id in special.items()
                },
            },
            "decoder": {"type": "Sequence", "decoders": [{"type": "Fuse"}, strip]},
            "model": {
                "type": "BPE",
                "dropout": None,
                "unk_token": None,
                "continuing_subword_prefix": None,
                "end_of_word_suffix": None,
                "fuse_unk": False,
                "byte_fallback": False,
                "ignore_merges": False,
                "vocab": vocab,
                "merges": [[names[left], names[right]] for left, right in tokenizer.merges],
            },
        },
    )


def _template(kind: str, name: str) -> dict[str, Any]:
    return {kind: {"id": name, "type_id": 0}}


def import_hugging_face(
    path: str | os.PathLike, codec: dict[str, Any] | None = None, bos: str = "<s>", eos: str = "</s>"
) -> Tokenizer:
    """The tokenizer of a `tokenizer.json` with a BPE model over the 256 characters. Its ids are kept.

    Raises UserError if it has another kind of model, changes or splits its text first, lacks a character,
    BOS or EOS, or could apply two merges for one token.
    """
    fields = read_vocabulary(path)
    model = fields.get("model") if isinstance(fields, dict) else None
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise UserError(str(path), 'must be a tokenizer.json with a model of type "BPE"')
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "ignore_merges"):
        if model.get(name):
            raise UserError(f"{path}: {name} {model[name]}", "is not supported: ids would differ")
    vocab: dict[str, int] = dict(model["vocab"])
    vocab |= {token["content"]: token["id"] for token in fields.get("added_tokens") or []}
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    prefix = DUMMY_PREFIX if _prepends(str(path), fields) else None
    if prefix not in vocab and model.get("unk_token") is None:  # what has no id then falls away
        prefix = None
    return _import(str(path), vocab, [(left, right) for left, right in pairs], codec, bos, eos, prefix)


def _prepends(path: str, fields: dict[str, Any]) -> bool:
    """Whether a document begins with the dummy prefix. Raises UserError if it is changed or split otherwise.

    Conversions of SentencePiece models say it in two ways, and also that spaces, of which a document has
    none, become the prefix's character.
    """
    normalizer, splitter = fields.get("normalizer"), fields.get("pre_tokenizer")
    steps = (normalizer or {}).get("normalizers", [normalizer] if normalizer else [])
    prepend = {"type": "Prepend", "prepend": DUMMY_PREFIX}
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": DUMMY_PREFIX}
    if not all(step in (prepend, spaces) for step in steps):
        raise UserError(f"{path}: normalizer {normalizer}", "is not supported: a document has to be one word")
    metaspace = {"type": "Metaspace", "replacement": DUMMY_PREFIX, "split": False}
    if splitter is not None and splitter | metaspace != splitter:
        raise UserError(
            f"{path}: pre_tokenizer {splitter}", "is not supported: a document has to be one word"
        )
    return prepend in steps or (splitter or {}).get("prepend_scheme", "never") != "never"


def import_sentencepiece(
    path: str | os.PathLike,
    codec: dict[str, Any] | None = None,
    bos: str | None = None,
    eos: str | None = None,
    added: dict[str, int] | None = None,
) -> Tokenizer:
    """The tokenizer of a SentencePiece BPE model over the 256 characters. Its ids are kept.

    SentencePiece joins two neighbours whenever that gives a piece. The pair that it ever joins for a piece is
    found by encoding the piece with those of higher scores. A model with a dummy prefix begins every document
    with its id.

    Args:
        codec: of the streams.
        bos, eos: the pieces of these roles; by default those that the model names.
        added: ids of tokens that a library puts beside those of the model.

    Raises UserError if it is another kind of model, lacks a character, BOS or EOS, or has a piece that is
    never made, or one that joins the dummy prefix with bytes.
    """
    try:
        model = read_model(Path(path).read_bytes())
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(str(path), f"is no SentencePiece model: {error}") from error
    if model.model_type != BPE:
        raise UserError(f"{path}: model type {model.model_type}", f"must be {BPE}, byte-pair encoding")
    names = [piece.text for piece in model.pieces]
    roles = [bos, eos]
    for i, (role, id) in enumerate((("BOS", model.bos_id), ("EOS", model.eos_id))):
        if roles[i] is None and not 0 <= id < len(names):
            raise UserError(f"{path}: {role} id {id}", "must be the id of a piece")
        roles[i] = roles[i] or names[id]

    joined = [piece for piece in model.pieces if piece.kind == NORMAL and len(piece.text) > 1]
    ranks: dict[tuple[str, str], int] = {}
    for piece in sorted(joined, key=lambda piece: -piece.score):
        parts = _encode(piece.text, ranks)
        if len(parts) != 2:
            raise UserError(f"{path}: piece {piece.text}", f"is never made: it falls apart into {parts}")
        ranks[parts[0], parts[1]] = len(ranks)
    prefix = DUMMY_PREFIX if model.add_dummy_prefix else None
    vocab = (added or {}) | {name: id for id, name in enumerate(names)}
    return _import(str(path), vocab, list(ranks), codec, str(roles[0]), str(roles[1]), prefix)


def _encode(text: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    parts = list(text)
    while found := [(ranks[pair], i) for i, pair in enumerate(pairwise(parts)) if pair in ranks]:
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


def _import(
    source: str,
    vocab: dict[str, int],
    pairs: list[tuple[str, str]],
    codec: dict[str, Any] | None,
    bos: str,
    eos: str,
    prefix: str | None,
) -> Tokenizer:
    for name in [*CHARACTERS, bos, eos, *([prefix] if prefix else [])]:
        if name not in vocab:
            raise UserError(f"{source}: {name!r}", "is missing; there must be U+2800 to U+28FF, BOS and EOS")
    tokens = {character: byte for byte, character in enumerate(CHARACTERS)}
    merges: list[Merge] = []
    others: list[tuple[str, str]] = []
    for left, right in pairs:
        if prefix and left.startswith(prefix):
            raise UserError(f"{source}: merge {left!r} {right!r}", "joins the dummy prefix with bytes")
        # Conversions from SentencePiece list every way to make a token, also before its parts.
        if left + right in tokens or left not in tokens or right not in tokens:
            others.append((left, right))
            continue
        if left + right not in vocab:
            raise UserError(f"{source}: merge {left!r} {right!r}", "makes a token without an id")
        tokens[left + right] = NUM_BYTES + len(merges)
        merges.append((tokens[left], tokens[right]))
    for left, right in others:
        if not {left, right, left + right} <= tokens.keys():
            raise UserError(
                f"{source}: merge {left!r} {right!r}", "joins what no byte or earlier merge gives"
            )

    kept = tuple(vocab[name] for name in tokens)
    num_tokens = max(vocab.values()) + 1
    ids = None
    if (*kept, vocab[bos], vocab[eos]) != tuple(range(num_tokens)) or prefix:
        ids = ForeignIds(kept, vocab[bos], vocab[eos], num_tokens, (vocab[prefix],) if prefix else ())
    tokenizer = Tokenizer(merges, codec, ids=ids)
    # In a proper vocabulary the first merge for a token leaves nothing for a second one to join.
    if others and not tokenizer.proper:
        raise UserError(source, "has two merges for one token, and either may apply")
    return tokenizer
