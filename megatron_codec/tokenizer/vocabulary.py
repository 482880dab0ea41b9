"""The tokenizer's file: one JSON object, checked field by field when it is read.

format      "megatron_codec.tokenizer"
version     1
codec       {"name": ..., "settings": {...}} of the streams it was trained on, or null
vocab_size  256 bytes and the merges
merges      [[left, right], ...]; merge k makes token 256 + k of two tokens before it
ids         null, or the ids of a vocabulary that came from elsewhere (`ForeignIds`)
trained_on  sha256 over the documents' sha256, their number and bytes, what was dropped; or null
hash        sha256 over codec, merges and ids: equal hashes give equal ids
"""

import hashlib
import json
import os
from dataclasses import asdict, dataclass
from dataclasses import fields as dataclass_fields
from pathlib import Path
from typing import Any

from megatron_codec.errors import UserError
from megatron_codec.files import whole_file

FORMAT = "megatron_codec.tokenizer"
VERSION = 1
NUM_BYTES = 256
MAX_VOCAB_SIZE = 65534  # ids are uint16, and BOS and EOS come on top
FIELDS = ["format", "version", "codec", "vocab_size", "merges", "ids", "trained_on", "hash"]

Merge = tuple[int, int]


@dataclass(frozen=True)
class ForeignIds:
    """Ids that do not follow the order of bytes, merges, BOS, EOS.

    Args:
        tokens: the id of each of the 256 bytes, then of each merge.
        bos, eos: ids of the marks around a document.
        num_tokens: ids in all, those without a use here included.
        prefix: ids that every document begins with, after BOS, unless it is empty. They stand for no bytes.
    """

    tokens: tuple[int, ...]
    bos: int
    eos: int
    num_tokens: int
    prefix: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        used = [*self.tokens, self.bos, self.eos, *self.prefix]
        if len(set(used)) < len(used):
            raise UserError("the ids", "must differ from each other, BOS and EOS included")
        if min(used) < 0 or max(used) >= self.num_tokens or self.num_tokens > MAX_VOCAB_SIZE + 2:
            raise UserError(
                f"ids up to {max(used)} of {self.num_tokens}", f"must lie in [0, {MAX_VOCAB_SIZE + 2})"
            )


def identity_hash(codec: dict | None, merges: list[Merge], ids: ForeignIds | None) -> str:
    """sha256, in hexadecimal, over everything that decides which ids a stream gets."""
    identity = {"codec": codec, "ids": ids and asdict(ids), "merges": merges}
    return hashlib.sha256(json.dumps(identity, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def write_vocabulary(path: str | os.PathLike, fields: dict[str, Any]) -> None:
    """Writes the fields whole, one a line."""
    lines = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in fields.items()]
    with whole_file(path, "w") as stream:
        stream.write("{\n" + ",\n".join(lines) + "\n}\n")


def read_vocabulary(path: str | os.PathLike) -> Any:
    """The JSON value in a file. Raises UserError if there is none."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(str(path), f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise UserError(
            str(path), f"is not a whole JSON file: {error}", "train or copy the tokenizer again"
        ) from error


def check_fields(fields: Any) -> dict[str, Any]:
    """The fields as Tokenizer's arguments. Raises UserError for the first that is missing, unknown or wrong.

    That merges use known ids and do not repeat is left to the C++ vocabulary, which checks every merge.
    """
    if not isinstance(fields, dict) or fields.get("format") != FORMAT:
        raise UserError("the tokenizer", f'must be a JSON object with "format": "{FORMAT}"')
    if fields.get("version") != VERSION:
        raise UserError(
            f"version {fields.get('version')}", f"must be {VERSION}", "install the release that wrote it"
        )
    if set(fields) != set(FIELDS):
        odd = ", ".join(sorted(set(fields) ^ set(FIELDS)))
        raise UserError(f"field {odd}", f"is missing or unknown; a tokenizer has {', '.join(FIELDS)}")

    codec = fields["codec"]
    if codec is not None and not (
        isinstance(codec, dict)
        and set(codec) == {"name", "settings"}
        and isinstance(codec["name"], str)
        and isinstance(codec["settings"], dict)
    ):
        raise UserError(f"codec {codec}", 'must be null or {"name": ..., "settings": {...}}')

    merges = fields["merges"]
    if not isinstance(merges, list) or not all(map(is_merge, merges)):
        wrong = next((m for m in merges if not is_merge(m)), None) if isinstance(merges, list) else merges
        raise UserError(f"merge {wrong}", "must be a pair of ids")
    if fields["vocab_size"] != NUM_BYTES + len(merges):
        raise UserError(f"vocab_size {fields['vocab_size']}", f"must be {NUM_BYTES} and {len(merges)} merges")

    merges = [(left, right) for left, right in merges]
    ids = None if fields["ids"] is None else read_ids(fields["ids"])
    if fields["hash"] != identity_hash(codec, merges, ids):
        raise UserError(
            f"hash {fields['hash']}",
            "does not fit codec, merges and ids",
            "the file was changed; train or copy it again",
        )
    return {"merges": merges, "codec": codec, "trained_on": fields["trained_on"], "ids": ids}


def is_merge(value: Any) -> bool:
    """Whether a JSON value is a pair of ids."""
    return (
        isinstance(value, list | tuple)
        and len(value) == 2
        and all(type(i) is int and 0 <= i < 65536 for i in value)
    )


def read_ids(value: Any) -> ForeignIds:
    """ForeignIds of a JSON value. Raises UserError."""
    names = [field.name for field in dataclass_fields(ForeignIds)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise UserError("ids", f"must be null or an object of {', '.join(names)}")
    lists = [value["tokens"], value["prefix"]]
    if not all(isinstance(numbers, list | tuple) for numbers in lists):
        raise UserError("ids", "must have lists of tokens and prefix")
    if not all(
        type(id) is int for id in [*lists[0], *lists[1], value["bos"], value["eos"], value["num_tokens"]]
    ):
        raise UserError("ids", "must be whole numbers")
    return ForeignIds(tuple(lists[0]), value["bos"], value["eos"], value["num_tokens"], tuple(lists[1]))
