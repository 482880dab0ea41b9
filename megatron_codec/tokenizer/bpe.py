"""Byte-pair encoding of codec streams, a whole document at a time and without pre-tokenization.

    tokenizer = Tokenizer.train(streams, vocab_size=320, codec=codec.to_dict())
    tokenizer.save("tokenizer.json")
    ids = tokenizer.encode(stream)              # uint16 [num_ids]
    tokenizer.decode(ids) == stream

Ids 0 to 255 are the bytes, then come the merges in the order of training, then BOS and EOS. Encoding applies
the merges to a document in that order, each from left to right (Sennrich et al., "Neural Machine Translation
of Rare Words with Subword Units", 2016, section 3.2), which is what Hugging Face `tokenizers` does with a
document given as one word.
"""

import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from megatron_codec._csrc import BpeEncoder
from megatron_codec.errors import UserError
from megatron_codec.tokenizer.training import train_merges
from megatron_codec.tokenizer.vocabulary import (
    FORMAT,
    NUM_BYTES,
    VERSION,
    ForeignIds,
    Merge,
    check_fields,
    identity_hash,
    read_vocabulary,
    write_vocabulary,
)

Stream = bytes | bytearray | memoryview | np.ndarray  # contiguous, one byte an item; never copied


class Tokenizer:
    """Ids of codec streams. Immutable, and safe to share between threads and to send to processes.

    Args:
        merges: pairs of ids; merge k makes token 256 + k of two tokens before it.
        codec: `Codec.to_dict()` of the streams it is for, or None.
        trained_on: a record of the training corpus, kept for the reader.
        ids: ids of a vocabulary that came from elsewhere; None for bytes, merges, BOS, EOS in this order.

    Raises UserError for a merge of unknown ids, a duplicate, and more than 65,534 entries.
    """

    def __init__(
        self,
        merges: Sequence[Merge],
        codec: dict[str, Any] | None = None,
        trained_on: dict[str, Any] | None = None,
        ids: ForeignIds | None = None,
    ):
        self.merges = [(int(left), int(right)) for left, right in merges]
        self.codec = None if codec is None else json.loads(json.dumps(codec))
        self.trained_on = trained_on
        self.ids = ids
        self.vocab_size = NUM_BYTES + len(self.merges)
        self.bos = ids.bos if ids else self.vocab_size
        self.eos = ids.eos if ids else self.vocab_size + 1
        self.num_tokens = ids.num_tokens if ids else self.vocab_size + 2
        self.prefix = list(ids.prefix) if ids else []
        self.hash = identity_hash(self.codec, self.merges, ids)
        self._encoder = BpeEncoder(self.merges, list(ids.tokens) if ids else [], self.prefix)

    @property
    def proper(self) -> bool:
        """Whether every token encodes to itself, as trained ones do. Others are encoded a slower way."""
        return self._encoder.proper

    @property
    def unused(self) -> list[int]:
        """Ids of a vocabulary from elsewhere that stand for nothing here, such as <unk>; else none."""
        if self.ids is None:
            return []
        used = {*self.ids.tokens, self.bos, self.eos, *self.prefix}
        return [id for id in range(self.num_tokens) if id not in used]

    @classmethod
    def train(
        cls,
        streams: Iterable[bytes],
        vocab_size: int = 320,
        codec: dict[str, Any] | None = None,
        max_token_length: int | None = None,
        drop_duplicates: bool = False,
        drop_flat: bool = False,
        progress: bool = False,
    ) -> "Tokenizer":
        """Merges the most frequent pair of neighbours, the smallest pair of ids among equals, until
        `vocab_size` is reached or no pair is left.

        Pairs never reach across documents. Holds about 8 bytes a corpus byte; at most 4 GiB of corpus.

        Args:
            streams: documents.
            vocab_size: bytes and merges.
            max_token_length: the most bytes that a token may stand for.
            drop_duplicates: count a document once, however often it comes.
            drop_flat: leave out documents that are little but repetition, such as single-colour pictures.
            progress: show a progress bar over the merges.

        Raises UserError for a vocabulary size out of range, and if no document is left.
        """
        merges, trained_on = train_merges(
            streams, vocab_size, max_token_length, drop_duplicates, drop_flat, progress
        )
        return cls(merges, codec, trained_on)

    def encode(self, stream: Stream) -> np.ndarray:
        """The ids of one document, uint16 [num_ids], without BOS and EOS."""
        return self._encoder.encode(stream)

    def encode_to_list(self, stream: Stream) -> list[int]:
        """The same as a list, for JSON; an array is several times faster."""
        return self._encoder.encode_to_list(stream)

    def encode_later_part(self, part: Stream) -> np.ndarray:
        """The ids of a document from one of its token borders on, uint16 [num_ids]: without a prefix."""
        return self._encoder.encode(part, later_part=True)

    def last_border(self, stream: Stream) -> int:
        """The last byte, or 0, before which every document that begins with `stream` has a token border,
        since no token holds that byte and the one before side by side."""
        return self._encoder.last_border(stream, 0)

    def incremental_encoder(self) -> "IncrementalEncoder":
        """An encoder for one document that comes in pieces."""
        return IncrementalEncoder(self._encoder)

    def encode_batch(
        self,
        streams: Sequence[Stream],
        out: np.ndarray | None = None,
        threads: int = 1,
        add_special_tokens: bool = False,
    ) -> tuple[np.ndarray, np.ndarray]:
        """The ids of many documents, one after the other.

        Args:
            streams: documents.
            out: where to write, uint16; made if None. It has to hold one id for each byte of the documents
                and for what is put around them, though fewer are written in the end.
            threads: how many to use; the interpreter is free for others meanwhile.
            add_special_tokens: put every document between BOS and EOS.

        Returns: ids, uint16 [num_ids], a view of `out`; and offsets, int64 [num_documents + 1]: document i is
        ids[offsets[i]:offsets[i + 1]].

        Raises UserError if `out` is too small or no such array, and for fewer than one thread.
        """
        around = [self.bos, self.eos] if add_special_tokens else []
        if out is None:
            extra = len(self.prefix) + len(around)
            out = np.empty(sum(len(stream) + extra for stream in streams), np.uint16)
        if out.dtype != np.uint16 or out.ndim != 1 or not out.flags.c_contiguous or not out.flags.writeable:
            raise UserError("out", "must be a writable one-dimensional uint16 array without gaps")
        if threads < 1:
            raise UserError(f"threads {threads}", "must be at least 1")
        offsets = self._encoder.encode_batch(streams, out, around, threads)
        return out[: offsets[-1]], offsets

    def decode(self, ids: np.ndarray | Sequence[int]) -> bytes:
        """The document of `ids`. BOS in front and EOS at the end are dropped.

        Raises UserError for an id that is no token, and for BOS or EOS elsewhere.
        """
        ids = np.asarray(ids)
        if ids.size == 0:
            return b""
        if ids.dtype != np.uint16:
            if ids.dtype.kind not in "iu":
                raise UserError(f"ids of type {ids.dtype}", "must be integers")
            if ids.min() < 0 or ids.max() >= self.num_tokens:
                raise UserError(f"ids {ids.min()} to {ids.max()}", f"must lie in [0, {self.num_tokens})")
            ids = ids.astype(np.uint16)
        begin, end = int(ids[0] == self.bos), len(ids) - int(ids[-1] == self.eos)
        if self.prefix and ids[begin : begin + len(self.prefix)].tolist() == self.prefix:
            begin += len(self.prefix)
        return self._encoder.decode(ids[begin:end])

    def decode_batch(self, ids: np.ndarray, offsets: np.ndarray) -> list[bytes]:
        """The documents that `encode_batch` encoded."""
        bounds = np.asarray(offsets).tolist()
        return [self.decode(ids[begin:end]) for begin, end in pairwise(bounds)]

    def token_bytes(self, id: int) -> bytes:
        """The bytes that an id stands for; none for BOS, EOS and a prefix. Raises UserError for others."""
        return b"" if id in (self.bos, self.eos, *self.prefix) else self.decode([id])

    def require_codec(self, codec: dict[str, Any]) -> None:
        """Raises UserError if the tokenizer was trained for another codec or other settings than `codec`."""
        codec = json.loads(json.dumps(codec))
        if codec != self.codec:
            raise UserError(
                f"a tokenizer for {describe(self.codec)}",
                f"does not fit streams of {describe(codec)}",
                "train one with tools/train_tokenizer.py, or change the codec's settings",
            )

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values; `from_dict` takes it back."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "codec": self.codec,
            "vocab_size": self.vocab_size,
            "merges": [list(merge) for merge in self.merges],
            "ids": self.ids and asdict(self.ids),
            "trained_on": self.trained_on,
            "hash": self.hash,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "Tokenizer":
        """The tokenizer of `to_dict`. Raises UserError for any field that is missing, unknown or wrong."""
        return cls(**check_fields(fields))

    def save(self, path: str | os.PathLike) -> None:
        """Writes one JSON file, whole."""
        write_vocabulary(path, self.to_dict())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "Tokenizer":
        """Reads the file that `save` wrote. Raises UserError, with the path, for anything else."""
        fields = read_vocabulary(path)
        try:
            return cls.from_dict(fields)
        except UserError as error:
            raise UserError(f"{path}: {error.value}", error.rule, error.remedy) from error

    def __reduce__(self):
        return Tokenizer.from_dict, (self.to_dict(),)

    def __repr__(self) -> str:
        return f"Tokenizer(vocab_size={self.vocab_size}, codec={describe(self.codec)}, hash={self.hash[:12]})"


class IncrementalEncoder:
    """Encodes one document that comes in pieces; all ids together are those of the whole document.

    Like the incremental encoders of Python's `codecs`. Holds back the bytes since the last place that no
    token can span; a piece costs time in proportion to its own length.
    """

    def __init__(self, encoder: BpeEncoder):
        self._encoder = encoder
        self._pending = bytearray()
        self._encoded = 0

    def encode(self, piece: Stream, final: bool = False) -> np.ndarray:
        """The ids that `piece` makes certain, uint16 [num_ids]; all that are left if it is the final one."""
        old = len(self._pending)
        self._pending += piece
        certain = len(self._pending) if final else self._encoder.last_border(self._pending, old)
        ids = self._encoder.encode(self._pending[:certain], later_part=self._encoded > 0)
        self._encoded += certain
        del self._pending[:certain]
        return ids


def describe(codec: dict[str, Any] | None) -> str:
    """A codec with its settings, for a message."""
    if codec is None:
        return "no codec in particular"
    settings = ", ".join(f"{name}={value}" for name, value in codec.get("settings", {}).items())
    return f"{codec.get('name')}({settings})"
