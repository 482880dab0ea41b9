"""PREFIX.json: what a dataset is, how it was made, and how to tell whether it is whole."""

import dataclasses
import hashlib
import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from megatron_codec.errors import UserError
from megatron_codec.files import whole_file

FORMAT, VERSION = "megatron_codec dataset", 2
BLOCK = 256  # documents that share a checksum
_PERCENTILES = (1, 5, 25, 50, 75, 95, 99)

# How the file ends: a checksum over all bytes before its line.
_END = re.compile(rb',\n "checksum": "([0-9a-f]{64})"\n\}\n\Z')

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
    """One pair of files, NAME.bin and NAME.idx in the folder of the manifest.

    Args:
        fingerprint: of the documents, see `Fingerprint`.
        blocks: for every 256 documents, the first 16 hexadecimal digits of the SHA-256 of their tokens, one
            after the other, so that a fault can be found and not only noticed.
    """

    name: str
    documents: int
    tokens: int
    bin_sha256: str
    idx_sha256: str
    fingerprint: str
    blocks: str

    @property
    def bin_bytes(self) -> int:
        """Size of NAME.bin."""
        return 2 * self.tokens

    @property
    def idx_bytes(self) -> int:
        """Size of NAME.idx; its layout is described in `indexed.py`."""
        return 34 + (4 + 8) * self.documents + 8 * (self.documents + 1)


def with_checksum(content: dict[str, Any]) -> bytes:
    """JSON whose last field is a checksum over all bytes before it."""
    body = json.dumps(content, indent=1).removesuffix("\n}").encode()
    return body + f',\n "checksum": "{hashlib.sha256(body).hexdigest()}"\n}}\n'.encode()


def length_statistics(lengths: np.ndarray) -> dict[str, float]:
    """Mean, extremes and percentiles of tokens a document; `lengths` integer [documents]."""
    quantiles = np.percentile(lengths, _PERCENTILES, method="nearest").tolist()
    return {
        "mean": round(float(lengths.mean()), 3),
        "min": int(lengths.min()),
        **{f"p{percent}": value for percent, value in zip(_PERCENTILES, quantiles, strict=True)},
        "max": int(lengths.max()),
    }


def no_skipped() -> dict[str, Any]:
    """`Manifest.skipped` where everything gave a document."""
    return {"count": 0, "reasons": {}, "first": []}


@dataclass(frozen=True)
class Manifest:
    """Everything about a dataset but its tokens.

    Args:
        codec: `{"name": ..., "settings": {...}}`, for `codecs.get_codec`.
        tokenizer: the whole content of the tokenizer's file, its `hash` included.
        shards: in the order of their documents.
        skipped: of what gave no document, `count`, `reasons` (kind to count), `first` (some of them, each
            with `name`, `kind` and `reason`), and `file` (all of them, a JSON object a line) if there are
            more.
        source: where the documents came from and which of them were taken.
        statistics: tokens a document, exact duplicates.
        versions: of the libraries whose output the documents are.
        command: the command line.
    """

    codec: dict[str, Any]
    tokenizer: dict[str, Any]
    shards: list[Shard]
    skipped: dict[str, Any] = field(default_factory=no_skipped)
    source: dict[str, Any] = field(default_factory=dict)
    statistics: dict[str, Any] = field(default_factory=dict)
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

    def save(self, path: str | os.PathLike, *, scratch: str | os.PathLike | None = None) -> None:
        """Writes the JSON file, whole; `scratch` as of `whole_file`."""
        head = {"format": FORMAT, "version": VERSION, "hash": self.hash}
        content = head | {"documents": self.documents, "tokens": self.tokens} | dataclasses.asdict(self)
        with whole_file(path, scratch=scratch) as file:
            file.write(with_checksum(content))

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Manifest":
        """Reads the file. Raises UserError if it is missing, no manifest, of another version or altered."""
        path = Path(path)
        if not path.is_file():
            remedy = "give the prefix that preprocessing was given as --output-prefix"
            raise UserError(f"{path}", "there is no such dataset", remedy)
        written = path.read_bytes()
        try:
            content = json.loads(written)
            kind = (content["format"], content["version"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path}", f"is not the whole manifest of a dataset ({error!r})", "write the dataset again"
            ) from error
        if kind != (FORMAT, VERSION):
            remedy = "write the dataset again"
            raise UserError(f"{path}: {kind[0]} {kind[1]}", f"must be {FORMAT} {VERSION}", remedy)
        end = _END.search(written)
        if not end or hashlib.sha256(written[: end.start()]).hexdigest() != end[1].decode():
            rule = "its checksum does not fit: it was altered after it was written"
            raise UserError(f"{path}", rule, "copy it again, or write the dataset again")
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
