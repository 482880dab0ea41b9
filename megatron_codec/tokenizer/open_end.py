"""The end of a document that goes on: which of its ids are certain, and which tokens can come instead of the
others.

A prompt is the beginning of a stream. Where it ends, the tokens of the whole stream may have no border: one
of them may span the end of the prompt and what follows. Encoded by itself the prompt then ends in tokens
that a model hardly ever saw there. What is given here lets the end be spelled anew, by every sequence of
tokens that the encoding of a longer document can have in its place.

The idea is known as token healing (Lundberg, "The Art of Prompt Design: Prompt Boundaries and Token
Healing", 2023), which takes back the last token and admits all that begin with its text. Here all are taken
back that what follows can change, and only encodings are admitted: with a proper vocabulary these are the
sequences of which each two neighbours encode to themselves.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import lru_cache

from megatron_codec.tokenizer.bpe import Tokenizer


@dataclass(frozen=True)
class Way:
    """One way in which the encoding of a longer document goes on behind the certain ids.

    Attributes:
        within: ids of tokens that end within the known bytes, or with them.
        beyond: ids of which one comes next: tokens that cover the rest of the known bytes and more. None
            where `within` covers all, and anything may follow.
    """

    within: tuple[int, ...]
    beyond: tuple[int, ...] = ()


@dataclass(frozen=True)
class OpenEnd:
    """What is known of the encoding of a document from its first bytes.

    Attributes:
        certain: ids that it begins with, whatever follows, those of `Tokenizer.prefix` included.
        ways: how it can go on; the first is the encoding of just these bytes.
    """

    certain: tuple[int, ...]
    ways: tuple[Way, ...]


def open_end(tokenizer: Tokenizer, stream: bytes) -> OpenEnd:
    """The certain ids of a document that begins with `stream`, and the ways behind them.

    A vocabulary that is not proper gives one way and nothing certain to be taken back: what its neighbours
    may be depends on more than each two of them.
    """
    ids = tokenizer.encode(stream)
    start = tokenizer.last_border(stream)
    last = stream[start:]
    # Before `start` nothing depends on what follows.
    whole = tuple(tokenizer.encode_later_part(last).tolist())
    before = tuple(ids[: len(ids) - len(whole)].tolist())
    if not tokenizer.proper:
        return OpenEnd((*before, *whole), (Way(()),))
    names = _by_bytes(tokenizer)
    longest = max(len(name) for name, _ in names)
    found = [Way(whole)]
    for place in range(max(0, len(last) - longest + 1), len(last)):
        rest = last[place:]
        longer = _longer(names, rest)
        if longer:
            within = tuple(tokenizer.encode_later_part(last[:place]).tolist())
            beyond = tuple(id for id in longer if not within or _neighbours(tokenizer, within[-1], id))
            if beyond:
                found.append(Way(within, beyond))
    alike = 0
    while all(len(way.within) > alike and way.within[alike] == whole[alike] for way in found):
        alike += 1
    ways = tuple(Way(way.within[alike:], way.beyond) for way in found)
    return OpenEnd((*before, *whole[:alike]), ways)


@lru_cache(maxsize=8)
def _by_bytes(tokenizer: Tokenizer) -> list[tuple[bytes, int]]:
    """Bytes and id of every token, sorted."""
    ids = tokenizer.ids.tokens if tokenizer.ids else range(tokenizer.vocab_size)
    return sorted((tokenizer.token_bytes(id), id) for id in ids)


def _longer(names: list[tuple[bytes, int]], start: bytes) -> list[int]:
    """Ids of the tokens that begin with these bytes and have more."""
    found, at = [], bisect_left(names, (start, -1))
    while at < len(names) and names[at][0].startswith(start):
        name, id = names[at]
        if len(name) > len(start):
            found.append(id)
        at += 1
    return found


def _neighbours(tokenizer: Tokenizer, left: int, right: int) -> bool:
    """Whether the bytes of two tokens side by side encode to these two."""
    both = tokenizer.token_bytes(left) + tokenizer.token_bytes(right)
    return tokenizer.encode_later_part(both).tolist() == [left, right]
