"""Reads SentencePiece's model files, without the library: a protocol buffer of which few fields matter here.

Field numbers are those of `sentencepiece_model.proto` in google/sentencepiece.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass

BPE = 2  # TrainerSpec.ModelType
NORMAL = 1  # ModelProto.SentencePiece.Type

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


@dataclass(frozen=True)
class Piece:
    """One entry of the vocabulary; its id is its place in the list."""

    text: str
    score: float
    kind: int


@dataclass(frozen=True)
class Model:
    """What a model file says. An id of -1 means that there is none."""

    pieces: list[Piece]
    model_type: int
    bos_id: int
    eos_id: int
    add_dummy_prefix: bool


def read_model(data: bytes) -> Model:
    """The model in `data`. Raises ValueError if that is no such protocol buffer."""
    pieces: list[Piece] = []
    trainer: dict[int, int | bytes] = {}
    normalizer: dict[int, int | bytes] = {}
    for number, value in _fields(data):
        if number in (1, 2, 3) and not isinstance(value, bytes):
            raise ValueError(f"field {number} is no message")
        if number == 1:
            fields = dict(_fields(value))
            text, score = fields.get(1, b""), fields.get(2, bytes(4))
            if not isinstance(text, bytes) or not isinstance(score, bytes):
                raise ValueError("a piece has a text and a score")
            kind = fields.get(3, NORMAL)
            pieces.append(Piece(text.decode(), struct.unpack("<f", score)[0], _integer(kind)))
        elif number == 2:
            trainer = dict(_fields(value))
        elif number == 3:
            normalizer = dict(_fields(value))
    if not pieces:
        raise ValueError("it has no pieces")
    return Model(
        pieces=pieces,
        model_type=_integer(trainer.get(3, 1)),
        bos_id=_integer(trainer.get(41, 1)),
        eos_id=_integer(trainer.get(42, 2)),
        add_dummy_prefix=bool(_integer(normalizer.get(3, 1))),
    )


def _integer(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise ValueError("a number is missing")
    return value if value < 1 << 63 else value - (1 << 64)


def _fields(data: bytes | int) -> Iterator[tuple[int, int | bytes]]:
    """Number and value of each field; fixed-width values stay bytes."""
    if isinstance(data, int):
        raise ValueError("a message is missing")
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        wire = key & 7
        if wire == _VARINT:
            value, position = _varint(data, position)
            yield key >> 3, value
            continue
        if wire == _BYTES:
            size, position = _varint(data, position)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if position + size > len(data):
            raise ValueError("it is truncated")
        yield key >> 3, data[position : position + size]
        position += size


def _varint(data: bytes, position: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        if position == len(data) or shift > 63:
            raise ValueError("it is truncated")
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        shift += 7
        if byte < 0x80:
            return value, position
