"""Which tokens can follow in a stream of a `JpegCodec`, so that it becomes a whole, strictly valid picture.

The automaton and the tables of tokens are C++ (csrc/jpeg_scan.hpp, csrc/jpeg_grammar.hpp).
"""

from collections.abc import Sequence

import numpy as np

from megatron_codec import _csrc
from megatron_codec._csrc import JpegCursor, JpegFault
from megatron_codec.codecs.jpeg_format import Format, explain
from megatron_codec.errors import UserError

TABLE_BYTES = 64 << 20  # of rows that are kept; ordinary use needs a tenth of them


class JpegGrammar:
    """See `codecs.base.Grammar`.

    Args:
        layout: of the scan.
        head: what streams begin with; may be empty.
        tokens: the bytes of each.
        canonical, in_range: what `Format.scan` says.
    """

    def __init__(
        self,
        layout: Format,
        head: bytes,
        tokens: Sequence[bytes],
        canonical: bool = False,
        in_range: bool = False,
    ):
        self.layout, self.num_tokens = layout, len(tokens)
        self._grammar = _csrc.JpegGrammar(layout.scan(canonical, in_range), head, tokens, TABLE_BYTES)
        self.read, self.done, self.finish = self._grammar.read, self._grammar.done, self._grammar.finish

    def begin(self, prompt: bytes) -> JpegCursor:
        """Where a stream stands after its first bytes. Raises UserError where no picture begins so."""
        cursor = self._grammar.begin()
        fault, offset, place = self._grammar.read_bytes(cursor, prompt)
        if fault != JpegFault.NONE:
            why = explain(self.layout, fault, place, prompt[offset:])
            raise UserError(
                f"byte {offset} of its stream",
                f"cannot be part of a picture: {why}",
                "cut the prompt from a valid stream, or switch the grammar off (constrain)",
            )
        return cursor

    def allow(self, cursors: Sequence[JpegCursor], left: Sequence[int], rows: np.ndarray) -> None:
        """Writes 1 into rows [b, at least num_tokens], uint8, for every token that can come next, else 0."""
        assert rows.dtype == np.uint8 and rows.strides[1] == 1 and len(rows) == len(cursors) == len(left)
        assert rows.shape[1] >= self.num_tokens
        self._grammar.allow(cursors, left, rows.ctypes.data, rows.strides[0])
