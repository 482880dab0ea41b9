"""Pictures to codec streams; what cannot be read is reported and skipped."""

import os
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.images import Geometry, canonical
from megatron_codec.preprocessing.decoders import (
    Decoder,
    PillowDecoder,
    picture_suffixes,
    pillow_versions,
)
from megatron_codec.preprocessing.encoder import Encoder
from megatron_codec.preprocessing.progress import Progress
from megatron_codec.preprocessing.skipping import Skipped, nothing_readable
from megatron_codec.preprocessing.sources import Item, Selection, Subset, open_inputs


@dataclass(frozen=True)
class PictureEncoder:
    """One stream a picture.

    Args:
        codec: what the streams are.
        geometry: how pictures become square.
        decoder: how files become pixels.
    """

    codec: ImageCodec
    geometry: Geometry = field(default_factory=Geometry)
    decoder: Decoder = field(default_factory=PillowDecoder)

    @property
    def suffixes(self) -> frozenset[str]:
        """Endings of the files that Pillow opens."""
        return picture_suffixes()

    @property
    def things(self) -> str:
        """See `Encoder`."""
        return "pictures"

    def encode(self, items: Iterable[Item]) -> Iterator[tuple[Item, list[bytes] | Skipped]]:
        """See `Encoder`."""
        size = self.codec.image_size

        def pixels_needed(width: int, height: int) -> tuple[int, int]:
            return self.geometry.pixels_needed(width, height, size)

        for item, picture in self.decoder.decode(items, pixels_needed):
            try:
                if isinstance(picture, Exception):
                    raise picture
                result = [self.codec.encode(canonical(picture, size, self.geometry, item.name))]
            except MemoryError:
                raise
            except Exception as error:
                result = Skipped.because(item, error)
            yield item, result

    def settings(self) -> dict[str, Any]:
        """See `Encoder`."""
        return {"geometry": asdict(self.geometry), "decoder": self.decoder.settings()}

    def versions(self) -> dict[str, str]:
        """See `Encoder`."""
        return pillow_versions() | self.decoder.versions()


def iterate_streams(
    inputs: Iterable[str | os.PathLike],
    encoder: Encoder,
    subset: Subset = "all",
    hold_out: float = 0.0,
    limit: int | None = None,
    progress: bool = True,
) -> Iterator[bytes]:
    """The streams of the items that these inputs hold, exactly as a dataset of them would hold.

    Broken items are left out; their number is printed to stderr at the end. Raises UserError as
    `Selection` and `open_inputs` do, and if not a single item can be read, at the end.
    """
    selection = Selection(tuple(map(Path, inputs)), subset, hold_out, limit)
    with tempfile.TemporaryDirectory() as spool:
        source = open_inputs(selection, encoder.suffixes, Path(spool), encoder.things)
        skipped: list[Skipped] = []
        with Progress("encoding", source.size, encoder.things, disable=not progress) as bar:
            reached = 0
            for item, result in encoder.encode(source):
                bar.advance(item.position + 1 - reached, 1, isinstance(result, Skipped))
                reached = item.position + 1
                if isinstance(result, Skipped):
                    skipped.append(result)
                else:
                    yield from result
        if len(skipped) == bar.items:
            raise nothing_readable(skipped[0], bar.items, encoder.things)
        if skipped:
            told = f"skipped {len(skipped)} of {bar.items} {encoder.things}, first {skipped[0].name}"
            print(told, file=sys.stderr)
