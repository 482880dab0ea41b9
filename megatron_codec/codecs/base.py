"""What a codec is, and how one is found by its name.

A codec is a frozen dataclass whose fields are its settings. A package can bring its own through an entry
point of the group `megatron_codec.codecs` that points at such a class:

    [project.entry-points."megatron_codec.codecs"]
    mine = "my_package.codec:MyCodec"
"""

import dataclasses
from collections.abc import Sequence
from importlib.metadata import entry_points
from pkgutil import resolve_name
from typing import Any, ClassVar, Protocol, runtime_checkable

import numpy as np

from megatron_codec.errors import UserError

ENTRY_POINTS = "megatron_codec.codecs"
BUILT_IN = {
    "jpeg": "megatron_codec.codecs.jpeg:JpegCodec",
    "avc": "megatron_codec.codecs.avc:AvcCodec",
    "pixels": "megatron_codec.codecs.pixels:PixelsCodec",
    "vq": "megatron_codec.codecs.vq:VqCodec",
}


@dataclasses.dataclass(frozen=True)
class Report:
    """The verdict of `Codec.check`: the first fault of a stream, and the byte where it lies."""

    valid: bool
    reason: str = ""
    offset: int | None = None


class DecodeError(UserError):
    """A stream that its codec cannot decode."""


@runtime_checkable
class Codec(Protocol):
    """The contract of every codec; `codecs/jpeg.py` is the one to read first."""

    name: ClassVar[str]
    file_suffix: ClassVar[str]

    @property
    def preamble(self) -> bytes:
        """What every stream begins with, and what generation from nothing is prompted with; may be empty."""
        ...

    def encode(self, media: Any) -> bytes:
        """The canonical stream of a picture or clip: equal pixels give equal bytes."""
        ...

    def decode(self, stream: bytes) -> Any:
        """The picture or clip; what a truncated or damaged stream lacks is filled in. Raises DecodeError."""
        ...

    def prompt(self, stream: bytes, ratio: float) -> bytes:
        """A prefix with the share `ratio` (0 to 1) of the stream's patches or frames, cut on their border."""
        ...

    def check(self, stream: bytes) -> Report:
        """Whether the stream is complete and strictly valid, and if not where it first fails."""
        ...

    def to_file(self, stream: bytes) -> bytes:
        """The content of a file that any viewer of the format opens. Raises DecodeError."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """`{"name": ..., "settings": {...}}`, JSON values only; `get_codec` takes both back."""
        ...


class Grammar(Protocol):
    """Which tokens can follow in a stream, so that it becomes a whole and valid one.

    A codec may have one: a method `grammar(tokens, canonical, in_range)`, given the bytes of each token; it
    returns None for settings that have none. A cursor is where a stream stands; it has a method `copy`.
    `begin`, `read`, `done` and `finish` may be called on several threads at a time, `allow` on one.
    """

    def begin(self, prompt: bytes) -> Any:
        """The cursor after the first bytes of a stream. Raises UserError where no stream begins so."""
        ...

    def allow(self, cursors: Sequence[Any], left: Sequence[int], rows: np.ndarray) -> None:
        """Writes 1 into uint8 rows [b, at least the number of tokens] for every token that can come next,
        else 0: none where the stream has ended and cannot go on.

        Args:
            left: tokens that can still come. Where they were enough for the end once, they always are.
        """
        ...

    def read(self, cursor: Any, token: int) -> bool:
        """Moves on by a token; False, and nothing moved, where that cannot come."""
        ...

    def done(self, cursor: Any) -> bool:
        """Whether the stream may end here: a clip's last slice may also go on."""
        ...

    def finish(self, cursor: Any) -> int:
        """Tokens that are enough to end the stream."""
        ...


class ImageCodec(Codec, Protocol):
    """A codec of square pictures; its `encode` takes them in any mode and size.

    One whose streams have bytes that only its tokens need has a method `stored_bytes(length)`: the bytes of
    so many, without these.
    """

    @property
    def image_size(self) -> int:
        """Side of the decoded picture in pixels."""
        ...


def get_codec(name: str, settings: dict[str, Any] | None = None) -> Codec:
    """The codec of that name with these settings (the defaults for those left out).

    Raises UserError for an unknown name, an unknown setting or a value that the codec refuses.
    """
    installed = {point.name: point.value for point in entry_points(group=ENTRY_POINTS)}
    known = installed | BUILT_IN
    if name not in known:
        raise UserError(f"codec '{name}'", f"must be one of {', '.join(sorted(known))}")
    codec_class = resolve_name(known[name])
    fields = [field.name for field in dataclasses.fields(codec_class)]
    unknown = sorted(set(settings or {}) - set(fields))
    if unknown:
        raise UserError(
            f"setting {', '.join(unknown)} of codec '{name}'", f"must be one of {', '.join(fields)}"
        )
    return codec_class(**(settings or {}))
