"""An encoder whose streams are checked one by one: --check of the tools that preprocess."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from megatron_codec.codecs import Codec
from megatron_codec.errors import UserError
from megatron_codec.preprocessing.encoder import Encoder
from megatron_codec.preprocessing.skipping import Skipped
from megatron_codec.preprocessing.sources import Item


@dataclass(frozen=True)
class CheckedEncoder:
    """The same streams as `inner`. One that the codec's own check does not find valid is a fault of the codec
    or of its library, and ends the run with a UserError that names the source."""

    inner: Encoder

    @property
    def codec(self) -> Codec:
        """See `Encoder`."""
        return self.inner.codec

    @property
    def suffixes(self) -> frozenset[str]:
        """See `Encoder`."""
        return self.inner.suffixes

    @property
    def things(self) -> str:
        """See `Encoder`."""
        return self.inner.things

    def encode(self, items: Iterable[Item]) -> Iterator[tuple[Item, list[bytes] | Skipped]]:
        """See `Encoder`."""
        for item, result in self.inner.encode(items):
            for stream in [] if isinstance(result, Skipped) else result:
                report = self.codec.check(stream)
                if not report.valid:
                    rule = (
                        f"was encoded to a stream that is not valid, at byte {report.offset}: {report.reason}"
                    )
                    raise UserError(item.label, rule, "report it with the picture or video")
            yield item, result

    def settings(self) -> dict[str, Any]:
        """See `Encoder`. Checking changes no stream."""
        return self.inner.settings()

    def versions(self) -> dict[str, str]:
        """See `Encoder`."""
        return self.inner.versions()
