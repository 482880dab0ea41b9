"""Pictures of the server: uploaded ones, those being made, and what is shown of them meanwhile."""

import base64
import io
import secrets
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from megatron_codec.codecs import AvcCodec, Codec, DecodeError, JpegCodec
from megatron_codec.inference.clips import made_up
from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.generation import Generation, Sample

# What Pillow may take an upload for: its readers of rarer formats are old and little tested.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP")
MAX_KEPT = 4096


def encode_upload(data: bytes, codec: Codec, max_pixels: int) -> bytes:
    """The stream of an uploaded picture file. Takes long; to be called in a thread. Raises ApiError."""
    try:
        picture = Image.open(io.BytesIO(data), formats=FORMATS)
        pixels = picture.width * picture.height
        if pixels <= max_pixels:
            # A JPEG file is decoded at an eighth, a quarter or half if that is still large enough.
            side = 2 * getattr(codec, "image_size", 32768)
            picture.draft("RGB", (side, side))
            return codec.encode(picture)
    except Exception as error:  # whatever a reader of damaged files comes to, the file is at fault
        formats = ", ".join(FORMATS)
        why = f"image: {len(data)} bytes that cannot be read as a picture ({formats}): {error}"
        raise ApiError(400, why, "image") from None
    raise ApiError(400, f"image: {pixels} pixels are more than the {max_pixels} that are taken", "image")


@dataclass(eq=False)
class Picture:
    """One picture, finished or not.

    Attributes:
        id: what it is called in URLs; cannot be guessed.
        prefix: the bytes of its prompt.
    """

    generation: Generation
    sample: Sample
    codec: Codec
    prefix: bytes
    id: str = field(default_factory=lambda: secrets.token_urlsafe(16))
    ended: float | None = None

    @property
    def stream(self) -> bytes:
        """All bytes so far."""
        return self.prefix + bytes(self.sample.data)

    def result(self) -> dict[str, Any]:
        """The fields of the finished picture for an answer."""
        report = self.codec.check(self.stream)
        return {
            "b64_json": file_b64(self.codec, self.stream),
            "id": self.id,
            "seed": self.generation.sampling.seed,
            "index": self.sample.index,
            "valid": report.valid,
            "bytes": len(self.stream),
            "removed": sum(self.sample.removed) / max(1, len(self.sample.removed)),
            "redrawn": self.sample.redrawn,
            "reason": report.reason,
            "finish_reason": self.sample.finish_reason,
            "new_tokens": len(self.sample.token_ids),
            **made_up(self.codec, self.stream),
        }


def file_b64(codec: Codec, stream: bytes) -> str | None:
    """The file that a viewer opens, in base64; None where the stream does not even begin like one."""
    try:
        return base64.b64encode(codec.to_file(stream)).decode()
    except DecodeError:
        return None


class Pictures:
    """Those that can be asked for by id: running ones, and finished ones for some time."""

    def __init__(self, seconds: float):
        self.seconds = seconds
        self._by_id: dict[str, Picture] = {}

    def add(self, picture: Picture) -> None:
        """Makes a picture known."""
        self._forget()
        self._by_id[picture.id] = picture

    def get(self, id: str) -> Picture:
        """The picture of that id. Raises ApiError."""
        self._forget()
        if id not in self._by_id:
            raise ApiError(404, "there is no picture of this id, or no longer", "id")
        return self._by_id[id]

    def _forget(self) -> None:
        now, finished = time.monotonic(), 0
        for picture in list(self._by_id.values()):
            if picture.sample.finish_reason is not None:
                picture.ended = picture.ended or now
                finished += 1
                if now - picture.ended > self.seconds:
                    del self._by_id[picture.id]
        old = [id for id, picture in self._by_id.items() if picture.ended]
        for id in old[: max(0, len(old) - MAX_KEPT)]:
            del self._by_id[id]


class Partials:
    """Decides when an unfinished picture is worth showing: evenly over the patches that are still to come.

    Args:
        count: how many to show; none are for a codec without a marker after every patch, which the rest of
            a picture cannot be shown grey without.
    """

    def __init__(self, picture: Picture, count: int):
        self.picture, self.codec = picture, picture.codec
        self.marks: list[float] = []
        if isinstance(self.codec, JpegCodec) and self.codec.restart_interval == 1:
            given, _ = self.codec.whole_patches(picture.prefix)
            left = self.codec.num_patches - given
            self.marks = [given + left * (k + 1) / (count + 1) for k in range(count)]
        self.shown, self.seen = 0, 0

    def new(self) -> Iterator[tuple[int, bytes]]:
        """Number and stream of the latest picture to show, if one is due."""
        data = self.picture.sample.data
        # Patches end with a marker, so without a new FF there is none.
        new = self.shown < len(self.marks) and data.find(b"\xff", max(0, self.seen - 1)) >= 0
        if new and isinstance(self.codec, JpegCodec):
            patches, stream = self.codec.whole_patches(self.picture.stream)
            due = sum(mark <= patches for mark in self.marks)
            if due > self.shown:
                self.shown = due
                yield due - 1, stream
        self.seen = len(data)


class Frames:
    """Tells when another frame of an unfinished clip is whole; never for what is no clip."""

    def __init__(self, picture: Picture):
        self.picture, self.codec = picture, picture.codec
        self.count, self.seen = 0, 0

    def new(self) -> int | None:
        """How many frames are whole, those of the prompt included, if that has changed."""
        if not isinstance(self.codec, AvcCodec):
            return None
        size = len(self.picture.sample.data)
        # A look goes over the whole stream. No frame has fewer bytes: a slice has a start code and a header.
        if size - self.seen < 4 * self.codec.num_macroblocks:
            return None
        self.seen = size
        before, (self.count, _) = self.count, self.codec.whole_frames(self.picture.stream)
        return self.count if self.count > before else None


class Painter:
    """The file of a picture in pieces, while it is made: a browser paints what it has.

    What has been sent stays a prefix of the file: `to_file` only ever adds, before the two bytes of the end.
    """

    def __init__(self, picture: Picture):
        self.picture, self.sent = picture, 0

    def new(self) -> bytes:
        """What can be sent now; with the end of the file once the picture has ended."""
        file = self.picture.codec.to_file(self.picture.stream)
        if self.picture.sample.finish_reason is None:
            file = file[:-2]
        piece = file[self.sent :]
        self.sent += len(piece)
        return piece
