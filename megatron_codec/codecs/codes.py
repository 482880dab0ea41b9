"""Pictures as rows of numbers from a fixed set, for codecs that are no files: colours of a palette, entries
of a codebook.

A code is two bytes, 128 + code / 128 and code mod 128, so that a first byte is never a second one and
byte-pair encoding cannot go astray: with the merges of `merges`, each code is one token.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from megatron_codec.codecs.base import Report
from megatron_codec.errors import UserError

_HIGH, _LOW_BITS = 0x80, 7
MAX_CODES = (256 - _HIGH) << _LOW_BITS


def to_stream(codes: np.ndarray) -> bytes:
    """The bytes of codes, an array of any shape with values of 0 to 16383, in its order."""
    codes = np.asarray(codes).reshape(-1)
    pairs = np.stack([_HIGH + (codes >> _LOW_BITS), codes & ((1 << _LOW_BITS) - 1)], axis=1)
    return pairs.astype(np.uint8).tobytes()


def from_stream(stream: bytes, num_codes: int) -> np.ndarray:
    """The codes [n] of a stream up to its end or its first fault."""
    pairs = np.frombuffer(stream[: len(stream) // 2 * 2], np.uint8).reshape(-1, 2).astype(np.int64)
    codes = ((pairs[:, 0] - _HIGH) << _LOW_BITS) + pairs[:, 1]
    wrong = (pairs[:, 0] < _HIGH) | (pairs[:, 1] >> _LOW_BITS > 0) | (codes >= num_codes)
    return codes[: int(wrong.argmax())] if wrong.any() else codes


def merges(num_codes: int) -> list[tuple[int, int]]:
    """The merges of a vocabulary in which token 256 + k is code k."""
    return [(_HIGH + (k >> _LOW_BITS), k & ((1 << _LOW_BITS) - 1)) for k in range(num_codes)]


def stored_bytes(length: int, num_codes: int) -> float:
    """Bytes of a stream of so many where each code has no more bits than it needs: how much is stored, since
    two bytes a code are for byte-pair encoding only."""
    return length / 2 * (num_codes - 1).bit_length() / 8


def check(stream: bytes, length: int, num_codes: int) -> Report:
    """Whether a stream is exactly `length` codes."""
    found = len(from_stream(stream, num_codes))
    if found >= length and len(stream) > 2 * length:
        return Report(False, f"goes on behind code {length}, the last one", 2 * length)
    if found < length:
        rest = stream[2 * found : 2 * found + 2]
        reason = f"is no code of {num_codes}" if len(rest) == 2 else f"ends after {found} of {length} codes"
        return Report(False, reason, 2 * found)
    return Report(True)


@dataclass
class CodeCursor:
    """Where a stream stands: behind so many codes."""

    codes: int

    def copy(self) -> "CodeCursor":
        """One that moves by itself."""
        return CodeCursor(self.codes)


class CodeGrammar:
    """See `codecs.base.Grammar`: any code, as many as the picture has, each as one token.

    Args:
        tokens: the bytes of each.
        length: codes of a picture.
        num_codes: how many different ones there are.

    Raises UserError for a vocabulary that lacks the token of a code.
    """

    def __init__(self, tokens: Sequence[bytes], length: int, num_codes: int):
        self.length, self.num_codes, self.num_tokens = length, num_codes, len(tokens)
        places = {token: number for number, token in enumerate(tokens)}
        wanted = [to_stream(np.array([code])) for code in range(num_codes)]
        lacking = next((code for code, token in enumerate(wanted) if token not in places), None)
        if lacking is not None:
            raise UserError(
                "a vocabulary", f"has no token for code {lacking}", "use the codec's own tokenizer"
            )
        self._row = np.zeros(len(tokens), np.uint8)
        self._row[[places[token] for token in wanted]] = 1

    def begin(self, prompt: bytes) -> CodeCursor:
        """Where a stream stands after its first bytes. Raises UserError where no picture begins so."""
        found = len(from_stream(prompt, self.num_codes))
        if 2 * found < len(prompt) or found > self.length:
            rule = f"cannot be part of a picture of {self.length} codes, 2 bytes each, below {self.num_codes}"
            raise UserError(f"byte {2 * min(found, self.length)} of its stream", rule)
        return CodeCursor(found)

    def allow(self, cursors: Sequence[CodeCursor], left: Sequence[int], rows: np.ndarray) -> None:
        """See `codecs.base.Grammar`. Each way to the end is as long, so `left` changes nothing."""
        del left
        rows[:] = 0
        for row, cursor in zip(rows, cursors, strict=True):
            if cursor.codes < self.length:
                row[: self.num_tokens] = self._row

    def read(self, cursor: CodeCursor, token: int) -> bool:
        """See `codecs.base.Grammar`."""
        if cursor.codes == self.length or not self._row[token]:
            return False
        cursor.codes += 1
        return True

    def done(self, cursor: CodeCursor) -> bool:
        """See `codecs.base.Grammar`."""
        return cursor.codes == self.length

    def finish(self, cursor: CodeCursor) -> int:
        """See `codecs.base.Grammar`."""
        return self.length - cursor.codes
