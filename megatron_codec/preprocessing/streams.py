"""Pictures to codec streams; what cannot be read is reported and skipped."""

import os
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from tqdm import tqdm

from megatron_codec.codecs import ImageCodec
from megatron_codec.codecs.images import Geometry, canonical
from megatron_codec.errors import UserError
from megatron_codec.preprocessing.sources import Source, Subset, open_pictures


@dataclass(frozen=True)
class Skipped:
    """A picture that gave no stream."""

    name: str
    reason: str


def encode_pictures(pictures: Source, codec: ImageCodec, geometry: Geometry) -> Iterator[bytes | Skipped]:
    """The stream of each picture, in order, or why there is none."""
    for i in range(len(pictures)):
        try:
            result = codec.encode(canonical(pictures.load(i), codec.image_size, geometry))
        # Pillow's decoders answer broken files with nearly every kind of exception there is.
        except Exception as error:
            result = Skipped(pictures.label(i), f"{type(error).__name__}: {error}")
        yield result


def iterate_streams(
    inputs: Iterable[str | os.PathLike],
    codec: ImageCodec,
    geometry: Geometry = "crop",
    subset: Subset = "all",
    hold_out: float = 0.0,
    limit: int | None = None,
    progress: bool = True,
) -> Iterator[bytes]:
    """The streams of the pictures that `open_pictures` finds, exactly as a dataset of them would hold.

    Broken pictures are left out; their number is printed to stderr at the end. Raises UserError as
    `open_pictures` does, at once, and if not a single picture can be read, at the end.
    """
    pictures = open_pictures(inputs, subset, hold_out, limit)
    return _readable(encode_pictures(pictures, codec, geometry), len(pictures), progress)


def _readable(results: Iterator[bytes | Skipped], total: int, progress: bool) -> Iterator[bytes]:
    skipped = []
    for result in tqdm(results, "encoding", total, unit=" pictures", disable=not progress):
        if isinstance(result, Skipped):
            skipped.append(result)
        else:
            yield result
    if len(skipped) == total:
        raise nothing_readable(skipped)
    if skipped:
        print(f"skipped {len(skipped)} of {total} pictures, first {skipped[0].name}", file=sys.stderr)


def nothing_readable(skipped: list[Skipped]) -> UserError:
    """The error for inputs in which no picture can be read."""
    first = f"{skipped[0].name} ({skipped[0].reason})"
    return UserError(f"--input: {len(skipped)} pictures", f"none of them can be read, first {first}")
