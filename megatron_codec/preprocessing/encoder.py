"""The contract between sources and datasets: items in, streams out."""

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from megatron_codec.codecs import Codec
from megatron_codec.preprocessing.skipping import Skipped
from megatron_codec.preprocessing.sources import Item


class Encoder(Protocol):
    """Turns items into codec streams. Is sent to worker processes."""

    @property
    def codec(self) -> Codec:
        """What the streams are."""
        ...

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of the files that it reads, lower case, with the dot."""
        ...

    @property
    def things(self) -> str:
        """What its items are called in messages: pictures, videos."""
        ...

    def encode(self, items: Iterable[Item]) -> Iterator[tuple[Item, list[bytes] | Skipped]]:
        """Each item, in order, with its streams or why there are none."""
        ...

    def settings(self) -> dict[str, Any]:
        """JSON values that, with the codec's settings, decide the streams; for the manifest."""
        ...

    def versions(self) -> dict[str, str]:
        """Versions of the libraries that have a part in the streams."""
        ...
