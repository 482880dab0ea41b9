"""The tokenizer files of a Hugging Face folder, read with their ids and written with ours."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron_codec.errors import UserError
from megatron_codec.files import write_json
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.exchange import (
    export_hugging_face,
    import_hugging_face,
    import_sentencepiece,
    to_text,
)

FAST, SLOW, SETTINGS = "tokenizer.json", "tokenizer.model", "tokenizer_config.json"


def read(folder: Path, codec: dict[str, Any]) -> Tokenizer:
    """The tokenizer of a folder that is not of our making; its ids are kept.

    A SentencePiece model comes before a tokenizer.json, which is then a conversion of it. BOS and EOS are
    found by their role, whatever they are called and wherever they stand.

    Args:
        codec: of the streams that it is for.

    Raises:
        UserError: there is none, or it is not over bytes as characters U+2800 + byte.
    """
    roles, added = _special_tokens(folder)
    bos, eos = roles.get("bos_token"), roles.get("eos_token")
    try:
        if (folder / SLOW).exists():
            return import_sentencepiece(folder / SLOW, codec, bos, eos, added)
        if (folder / FAST).exists():
            return import_hugging_face(folder / FAST, codec, bos or "<s>", eos or "</s>")
    except UserError as error:
        remedy = error.remedy or "only tokenizers over bytes, one character U+2800 + byte each, are converted"
        raise UserError(error.value, error.rule, remedy) from error
    raise UserError(
        f"--load {folder}", f"has no tokenizer ({SLOW} or {FAST})", "copy it there from where the weights are"
    )


def write(folder: Path, tokenizer: Tokenizer, context: int) -> None:
    """Writes what AutoTokenizer reads: a fast tokenizer with our ids that puts BOS in front.

    EOS is a token like others and is not added, since what comes behind a prompt is the model's to write.

    Args:
        context: the model's, in tokens.

    Raises:
        UserError: the vocabulary has two tokens for the same bytes.
    """
    export_hugging_face(tokenizer, folder / FAST, add_eos=False)
    special = {"bos_token": "<s>", "eos_token": "</s>"}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "model_max_length": context,
        # Without it, transformers gives the model token types, which a Llama does not take.
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
    }
    write_json(folder / SETTINGS, settings)
    write_json(folder / "special_tokens_map.json", special)


def require_same(folder: Path, tokenizer: Tokenizer) -> None:
    """Raises:
    UserError: tokenizer.json of a folder of our making gives other ids than the tokenizer beside it.
    """
    remedy = "copy the folder again: it was changed"
    try:
        there = import_hugging_face(folder / FAST, tokenizer.codec)
    except UserError as error:
        raise UserError(error.value, error.rule, error.remedy or remedy) from error
    if there.hash != tokenizer.hash:
        rule = f"gives other ids than the tokenizer {tokenizer.hash[:12]} that the model was trained with"
        raise UserError(str(folder / FAST), rule, remedy)


def library_encoder(folder: Path) -> Callable[[bytes], list[int]] | None:
    """What transformers' AutoTokenizer makes of a stream in this folder; None if it is not installed."""
    try:
        from transformers import AutoTokenizer
    except ImportError:
        return None
    tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=not (folder / SLOW).exists())
    tokenizer.model_max_length = sys.maxsize  # a longer stream is no fault here
    return lambda stream: tokenizer(to_text(stream), add_special_tokens=False)["input_ids"]


def _special_tokens(folder: Path) -> tuple[dict[str, str], dict[str, int]]:
    """Names by role (`bos_token`, ...), and ids of tokens that are added to those of the model."""
    roles: dict[str, str] = {}
    added: dict[str, int] = {}
    for name in ("special_tokens_map.json", SETTINGS):  # the later one wins, as in transformers
        fields = _object(folder / name)
        for role, token in fields.items():
            text = token.get("content") if isinstance(token, dict) else token
            if role.endswith("_token") and isinstance(text, str):
                roles[role] = text
        for id, token in (fields.get("added_tokens_decoder") or {}).items():
            added[token["content"]] = int(id)
    added |= _object(folder / "added_tokens.json")
    return roles, added


def _object(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(fields, dict), "it is no object"
        return fields
    except (OSError, ValueError, AssertionError) as error:
        raise UserError(str(path), f"cannot be read ({error})", "copy the folder again") from error
