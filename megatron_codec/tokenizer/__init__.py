"""Byte-pair encoding of whole codec streams. Read `bpe.py` first; the merging itself is C++ (csrc/bpe_*)."""

from megatron_codec.tokenizer.bpe import Tokenizer

__all__ = ["Tokenizer"]
