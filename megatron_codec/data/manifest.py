"""PREFIX.json: what a dataset is, how it was made, and how to tell whether it is whole."""

import dataclasses
import hashlib
import json
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_codec.errors import UserError
from megatron_codec.files import write_json

FORMAT, VERSION = "megatron_codec dataset", 1

_PRIME = 2**255 - 19
_BASE = int.from_bytes(hashlib.sha256(b"megatron_codec").digest(), "big") % _PRIME


@dataclass
class Fingerprint:
    """Identifies an ordered list of documents, and does not depend on how the list is cut into shards.

    The polynomial hash of Karp and Rabin (1987) over the SHA-256 of each document: the fingerprint of two
    lists in a row follows from the fingerprints of the two.
    """

    documents: int = 0
    value: int = 0

    def add(self, document: bytes) -> None:
        """Appends one document."""
        digest = int.from_bytes(hashlib.sha256(document).digest(), "big")
        self.value = (self.value * _BASE + digest) % _PRIME
        self.documents += 1

    def __add__(self, following: "Fingerprint") -> "Fingerprint":
        shifted = self.value * pow(_BASE, following.documents, _PRIME)
        return Fingerprint(self.documents + following.documents, (shifted + following.value) % _PRIME)

    @property
    def hex(self) -> str:
        """The value as 64 hexadecimal digits."""
        return f"{self.value:064x}"


@dataclass(frozen=True)
class Shard:
    """One pair of files, NAME.bin and NAME.idx in the folder of the manifest."""

    name: str
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str
    fingerprint: str

    @property
    def bin_bytes(self) -> int:
        """Size of NAME.bin."""
        return 2 * self.tokens

    @property
    def idx_bytes(self) -> int:
        """Size of NAME.idx; its layout is described in `indexed.py`."""
        return 34 + (4 + 8) * self.documents + 8 * (self.documents + 1)


@dataclass(frozen=True)
class Manifest:
    """Everything about a dataset but its tokens.

    Args:
        codec: `{"name": ..., "settings": {...}}`, for `codecs.get_codec`.
        tokenizer: the whole content of the tokenizer's file, its `hash` included.
        shards: in the order of their documents.
        skipped: `{"name": ..., "reason": ...}` of each source that gave no document.
        source: where the documents came from and which of them were taken.
        versions: of the libraries whose output the documents are.
        command: the command line.
    """

    codec: dict[str, Any]
    tokenizer: dict[str, Any]
    shards: list[Shard]
    skipped: list[dict[str, str]] = field(default_factory=list)
    source: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    command: list[str] = field(default_factory=list)

    @property
    def documents(self) -> int:
        """Number of documents."""
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        """Number of tokens, BOS and EOS of each document included."""
        return sum(shard.tokens for shard in self.shards)

    @cached_property
    def hash(self) -> str:
        """SHA-256 over what defines the documents: codec, tokenizer, and the documents in their order.

        Two datasets with equal hashes train alike. The number of shards has no influence.
        """
        parts = (Fingerprint(shard.documents, int(shard.fingerprint, 16)) for shard in self.shards)
        defining = {
            "codec": self.codec,
            "tokenizer": self.tokenizer["hash"],
            "documents": self.documents,
            "tokens": self.tokens,
            "fingerprint": sum(parts, Fingerprint()).hex,
        }
        return hashlib.sha256(json.dumps(defining, sort_keys=True).encode()).hexdigest()

    def save(self, path: str | os.PathLike) -> None:
        """Writes the JSON file, whole."""
        head = {"format": FORMAT, "version": VERSION, "hash": self.hash}
        write_json(
            path, head | {"documents": self.documents, "tokens": self.tokens} | dataclasses.asdict(self)
        )

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Manifest":
        """Reads the file. Raises UserError if it is missing, no manifest, of another version or altered."""
        path = Path(path)
        if not path.is_file():
            remedy = "give the prefix that preprocessing was given as --output-prefix"
            raise UserError(f"{path}", "there is no such dataset", remedy)
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            kind = (content["format"], content["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}", "is not the manifest of a dataset", "write the dataset again"
            ) from error
        if kind != (FORMAT, VERSION):
            raise UserError(f"{path}: {kind[0]} {kind[1]}", f"must be {FORMAT} {VERSION}")
        try:
            values: dict[str, Any] = {entry.name: content[entry.name] for entry in dataclasses.fields(cls)}
            values["shards"] = [Shard(**shard) for shard in values["shards"]]
            manifest = cls(**values)
            found = (manifest.documents, manifest.tokens, manifest.hash)
            recorded = (content["documents"], content["tokens"], content["hash"])
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path}", f"is damaged ({error!r})", "write the dataset again") from error
        if found != recorded:
            raise UserError(
                f"{path}", "its counts or its hash do not fit its shards", "write the dataset again"
            )
        return manifest
