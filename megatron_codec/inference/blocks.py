"""Who holds which block of the key-value cache, and which blocks hold the beginning of a known prompt.

The cache is cut into blocks of `BLOCK` tokens. A sequence has a list of blocks; sequences that begin with the
same tokens share the blocks of that beginning. A full block is known by the tokens in it and before it, so a
prompt that returns finds its keys and values, until the blocks are needed for something else.

Source: Kwon et al., "Efficient Memory Management for Large Language Model Serving with PagedAttention"
(2023), section 4; the keeping of prompts after vLLM's automatic prefix caching.
"""

import hashlib
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np

BLOCK = 32  # tokens; two tiles of the CPU kernel


def blocks_for(tokens: int) -> int:
    """How many blocks so many tokens fill."""
    return -(-tokens // BLOCK)


class OutOfBlocks(Exception):
    """Every block is in use."""


class BlockPool:
    """Hands out blocks 0 to `count` - 1.

    A block is in use (held by one or more sequences), kept (held by none, its content known, to be given
    away when no empty one is left, the longest unused first), or empty.
    """

    def __init__(self, count: int):
        self.count = count
        self._holders = [0] * count
        self._keys: list[bytes | None] = [None] * count  # of blocks whose content is known
        self._known: dict[bytes, int] = {}
        self._empty = list(reversed(range(count)))
        self._kept: OrderedDict[int, None] = OrderedDict()

    @property
    def available(self) -> int:
        """Blocks that can be taken now: empty and kept ones."""
        return len(self._empty) + len(self._kept)

    @property
    def used(self) -> int:
        """Blocks that sequences hold."""
        return self.count - self.available

    def take(self) -> int:
        """A block for one holder. Raises OutOfBlocks."""
        if self._empty:
            block = self._empty.pop()
        elif self._kept:
            block, _ = self._kept.popitem(last=False)
            self._forget(block)
        else:
            raise OutOfBlocks
        self._holders[block] = 1
        return block

    def share(self, block: int) -> None:
        """One more holder of a block that is in use or kept."""
        if self._holders[block] == 0:
            del self._kept[block]
        self._holders[block] += 1

    def give_back(self, blocks: Sequence[int]) -> None:
        """One holder less of each block. A sequence's last block is forgotten before its first."""
        for block in reversed(blocks):
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._keys[block] is None:
                    self._empty.append(block)
                else:
                    self._kept[block] = None

    def remember(self, block: int, key: bytes) -> None:
        """Says what a full block holds. If another one holds the same, that one stays the known one."""
        if self._keys[block] is None and key not in self._known:
            self._keys[block] = key
            self._known[key] = block

    def find(self, tokens: Sequence[int]) -> list[int]:
        """The known blocks of the longest beginning of `tokens`, in order. They are not yet held."""
        found = []
        for key in block_keys(tokens):
            block = self._known.get(key)
            if block is None:
                break
            found.append(block)
        return found

    def forget_all(self) -> None:
        """Forgets every prompt, as when the weights have changed."""
        for block in range(self.count):
            self._forget(block)
        self._empty.extend(self._kept)
        self._kept.clear()

    def _forget(self, block: int) -> None:
        key, self._keys[block] = self._keys[block], None
        if key is not None:
            del self._known[key]


def block_keys(tokens: Sequence[int], key: bytes = b"") -> list[bytes]:
    """What the full blocks of `tokens` are known by: a hash of each with all before it.

    Args:
        key: of the block before these tokens.
    """
    keys, ids = [], np.asarray(tokens, np.int32)
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        key = hashlib.blake2b(key + ids[start : start + BLOCK].tobytes(), digest_size=16).digest()
        keys.append(key)
    return keys
