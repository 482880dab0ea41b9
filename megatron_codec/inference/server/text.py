"""Bytes as text: one character a byte, at U+2800 + byte, as in the paper's public script.

Bytes of a JPEG file are no UTF-8, so the paper's tokenizer was trained over the 256 Braille patterns, which
are printable and need no escape in JSON.
"""

from collections.abc import Sequence

import numpy as np

from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer

FIRST = 0x2800


def to_text(data: bytes | bytearray) -> str:
    """The characters of some bytes."""
    return (np.frombuffer(data, np.uint8).astype("<u2") + FIRST).tobytes().decode("utf-16-le")


def to_bytes(text: str, name: str) -> bytes:
    """The bytes of some characters. Raises UserError, which begins with `name`, for any other character."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
    wrong = np.flatnonzero((codes < FIRST) | (codes > FIRST + 255))
    if len(wrong):
        raise UserError(
            f"{name} with U+{codes[wrong[0]]:04X} at {wrong[0]}",
            "must be text of the characters U+2800 + byte, one a byte of the file",
            "convert bytes by ''.join(chr(0x2800 + byte) for byte in data), or give token ids",
        )
    return (codes - FIRST).astype(np.uint8).tobytes()


class Vocabulary:
    """What each token stands for, looked up for every token that is sent.

    Attributes:
        data: of each id, its bytes; none for BOS, EOS and what else is no part of a file.
        text: the same as characters.
        name: the text, or a name for tokens without any, so that log-probabilities can tell them apart.
    """

    def __init__(self, tokenizer: Tokenizer):
        self.data = [_bytes_of(tokenizer, id) for id in range(tokenizer.num_tokens)]
        self.text = [to_text(data) for data in self.data]
        special = {tokenizer.bos: "<s>", tokenizer.eos: "</s>"}
        self.name = [text or special.get(id, f"<{id}>") for id, text in enumerate(self.text)]

    def join(self, ids: Sequence[int]) -> bytes:
        """The bytes of a sequence of ids."""
        return b"".join([self.data[id] for id in ids])


def _bytes_of(tokenizer: Tokenizer, id: int) -> bytes:
    try:
        return tokenizer.token_bytes(id)
    except UserError:  # an id that a foreign vocabulary has and does not use
        return b""
