"""What every source of media is: items in a fixed order, that can be cut into parts.

A source knows its `size`, a number of positions, without looking at what lies there; each item lies at one
of them. For files and arrays a position is an item. For tar files, which are read as a stream, a position
stands for 16 KiB, so that a tar file is cut among workers without an index. Positions in a row are the unit
of cutting, of progress and of going on.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, Protocol

import numpy as np

from megatron_codec.preprocessing.sources.place import Place

Subset = Literal["all", "train", "test"]


class UnusableError(Exception):
    """Why an item cannot be used.

    Args:
        kind: a few words that are the same for all faults of the kind, to be counted.
        reason: what is wrong with this one.
    """

    def __init__(self, kind: str, reason: str):
        self.kind, self.reason = kind, reason
        super().__init__(reason)

    def __reduce__(self):
        return UnusableError, (self.kind, self.reason)


@dataclass(slots=True)
class Item:
    """One picture or video of a source.

    Args:
        name: does not depend on where its folder lies, so that `held_out` decides alike on every machine.
        label: where it is, for messages.
        position: in its source.
        read: the content of its file, or the uint8 array itself. Raises OSError or `UnusableError`. To be
            called, if at all, before the source is asked for the next item.
        faulty: stands for a fault of the source itself (a tar file that ends too early), not for an item.
        place: where the content lies in a file, as it is, if it does.
    """

    name: str
    label: str
    position: int
    read: Callable[[], bytes | np.ndarray]
    faulty: bool = False
    place: Place | None = None


def unusable(name: str, label: str, position: int, kind: str, reason: str, faulty: bool = False) -> Item:
    """An item that cannot be read, for this reason."""

    def read() -> bytes:
        raise UnusableError(kind, reason)

    return Item(name, label, position, read, faulty)


class Source(Protocol):
    """Items in a fixed order. Sources are sent to worker processes, and open nothing before they are
    iterated."""

    @property
    def size(self) -> int:
        """Number of positions."""
        ...

    @property
    def digest(self) -> str:
        """Tells sources of other items from this one, as far as that is known without reading them."""
        ...

    def part(self, start: int, stop: int) -> "Source":
        """The items at positions `start` to `stop` (excluded)."""
        ...

    def __iter__(self) -> Iterator[Item]: ...


class JoinedSource:
    """Several sources, one after the other."""

    def __init__(self, sources: Sequence[Source]):
        self._sources = list(sources)
        self._ends = list(accumulate(source.size for source in self._sources))

    @property
    def size(self) -> int:
        """Number of positions."""
        return self._ends[-1] if self._ends else 0

    @property
    def digest(self) -> str:
        """See `Source`."""
        return hashlib.sha256("\n".join(source.digest for source in self._sources).encode()).hexdigest()

    def part(self, start: int, stop: int) -> "JoinedSource":
        """See `Source`."""
        parts = []
        for i in range(bisect_right(self._ends, start), len(self._sources)):
            begin = self._ends[i] - self._sources[i].size
            if begin >= stop:
                break
            parts.append(self._sources[i].part(max(start - begin, 0), min(stop, self._ends[i]) - begin))
        return JoinedSource(parts)

    def __iter__(self) -> Iterator[Item]:
        for source, end in zip(self._sources, self._ends, strict=True):
            begin = end - source.size
            for item in source:
                item.position += begin
                yield item


class SubsetSource:
    """The items of a source that are held out, or those that are not."""

    def __init__(self, source: Source, share: float, take_held_out: bool):
        self._source, self._share, self._take_held_out = source, share, take_held_out

    @property
    def size(self) -> int:
        """Number of positions."""
        return self._source.size

    @property
    def digest(self) -> str:
        """See `Source`."""
        return self._source.digest

    def part(self, start: int, stop: int) -> "SubsetSource":
        """See `Source`."""
        return SubsetSource(self._source.part(start, stop), self._share, self._take_held_out)

    def __iter__(self) -> Iterator[Item]:
        for item in self._source:
            if item.faulty or held_out(item.name, self._share) == self._take_held_out:
                yield item


class SpreadSource:
    """At most `limit` items, evenly spread over a source; one position an item.

    Walks through the whole source once, without reading any item.
    """

    def __init__(self, source: Source, limit: int):
        count = sum(1 for _ in source)
        limit = min(limit, count)
        places = np.zeros((limit, 2), np.int64)
        chosen = 0
        for ordinal, (item, nth) in enumerate(_numbered(source)):
            if chosen < limit and ordinal == chosen * count // limit:
                places[chosen] = item.position, nth
                chosen += 1
        self._source, self._places = source, places

    @classmethod
    def _of(cls, source: Source, places: np.ndarray) -> "SpreadSource":
        made = cls.__new__(cls)
        made._source, made._places = source, places
        return made

    @property
    def size(self) -> int:
        """Number of positions."""
        return len(self._places)

    @property
    def digest(self) -> str:
        """See `Source`."""
        return hashlib.sha256(self._source.digest.encode() + self._places.tobytes()).hexdigest()

    def part(self, start: int, stop: int) -> "SpreadSource":
        """See `Source`."""
        places = self._places[start:stop].copy()
        if not len(places):
            return self._of(self._source.part(0, 0), places)
        first, last = int(places[0, 0]), int(places[-1, 0])
        places[:, 0] -= first
        return self._of(self._source.part(first, last + 1), places)

    def __iter__(self) -> Iterator[Item]:
        chosen = 0
        for item, nth in _numbered(self._source):
            if chosen == len(self._places):
                return
            if (item.position, nth) == tuple(self._places[chosen].tolist()):
                item.position = chosen
                chosen += 1
                yield item


def _numbered(source: Source) -> Iterator[tuple[Item, int]]:
    """The items, each with its number among those at the same position."""
    position, nth = -1, 0
    for item in source:
        nth = nth + 1 if item.position == position else 0
        position = item.position
        yield item, nth


def held_out(name: str, share: float) -> bool:
    """Whether an item of this name belongs to the held-out share; the same on every machine."""
    digest = hashlib.sha256(name.encode("utf-8", "surrogateescape")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
