"""The grammar of a codec among the samples of an engine: which tokens each of them may go on with.

A sample's cursor is where its stream stands. Rows of samples that are sampled together make one mask.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_codec.codecs import Codec
from megatron_codec.codecs.base import Grammar
from megatron_codec.errors import UserError
from megatron_codec.tokenizer import Tokenizer


class Masks:
    """Masks of one engine.

    Args:
        width: of a row, the padded vocabulary.
        canonical, in_range: see `EngineConfig`.
    """

    def __init__(
        self,
        codec: Codec,
        tokenizer: Tokenizer,
        width: int,
        device: torch.device,
        canonical: bool = False,
        in_range: bool = False,
    ):
        self.tokenizer, self.width, self.device = tokenizer, width, device
        make = getattr(codec, "grammar", None)
        # The grammar numbers the tokens that stand for bytes; a vocabulary from elsewhere has ids of its own.
        ids = tokenizer.ids.tokens if tokenizer.ids else range(tokenizer.vocab_size)
        self._ids, self._number = np.array(ids), {id: number for number, id in enumerate(ids)}
        tokens = [tokenizer.token_bytes(id) for id in ids]
        self.grammar: Grammar | None = make(tokens, canonical, in_range) if make else None

    def begin(self, prompt: Sequence[int], name: str = "prompt") -> Any:
        """The cursor behind a prompt; None for a codec that has no grammar.

        Raises:
            UserError: no stream of the codec begins so.
        """
        if self.grammar is None:
            return None
        ids = list(prompt)
        for id in (self.tokenizer.bos, *self.tokenizer.prefix):
            if ids[:1] == [id]:
                del ids[0]
        special = next((id for id in ids if id not in self._number), None)
        if special is not None:
            raise UserError(
                f"{name} with token id {special}",
                "stands for no bytes, and a stream is bytes with BOS in front",
                "leave it out, or switch the grammar off (constrain)",
            )
        try:
            return self.grammar.begin(self.tokenizer.decode(ids))
        except UserError as error:
            raise UserError(f"{name}: {error.value}", error.rule, error.remedy) from None

    def of(self, cursors: Sequence[Any], left: Sequence[int]) -> Tensor | None:
        """Which tokens may come next, bool [b, width]; None where no row has a grammar.

        Args:
            cursors: of each row, None where anything may come.
            left: new tokens of each row at most, the next one included.
        """
        rows = [row for row, cursor in enumerate(cursors) if cursor is not None]
        if not rows:
            return None
        assert self.grammar is not None
        found = np.zeros((len(rows), self.width), np.uint8)
        guided = [cursors[row] for row in rows]
        numbered = found if self.tokenizer.ids is None else np.zeros((len(rows), len(self._ids)), np.uint8)
        # One of the tokens left is EOS.
        self.grammar.allow(guided, [left[row] - 1 for row in rows], numbered)
        if numbered is not found:
            found[:, self._ids] = numbered
        found[:, self.tokenizer.eos] = [self.grammar.done(cursor) for cursor in guided]
        if len(rows) < len(cursors):
            every = np.ones((len(cursors), self.width), np.uint8)
            every[rows] = found
            found = every
        mask = torch.from_numpy(found).bool()
        return mask.to(self.device, non_blocking=True)

    def read(self, cursor: Any, token: int) -> None:
        """Moves a cursor on by a token that its mask allowed."""
        if cursor is not None and token != self.tokenizer.eos:
            moved = self.follows(cursor, token)
            assert moved

    def follows(self, cursor: Any, token: int) -> bool:
        """Moves a cursor on by a token that stands for bytes; False, and nothing moved, if it cannot come."""
        assert self.grammar is not None
        return self.grammar.read(cursor, self._number[token])
