"""H.264 byte streams to frames with FFmpeg's decoder, sound or not, and what it had to make up."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from threading import Lock, local
from typing import TYPE_CHECKING, Any

import numpy as np

from megatron_codec.codecs.video_graph import pyav

if TYPE_CHECKING:
    import av

_CONCEALED = re.compile(r"concealing (\d+) DC, (\d+) AC, (\d+) MV errors")
_thread = local()
_logging = Lock()  # FFmpeg's log level is one for the whole process


@dataclass(frozen=True)
class Concealment:
    """What of a decoded clip was made up.

    Args:
        missing_frames: that repeat the last one.
        surplus_frames: that were cut off.
        wrong_size: frames of another size that were left out.
        macroblocks: that the decoder made up, for each frame of the clip that was decoded.
        total: macroblocks in a whole clip.
    """

    missing_frames: int
    surplus_frames: int
    wrong_size: int
    macroblocks: tuple[int, ...]
    total: int

    @property
    def share(self) -> float:
        """Of all macroblocks of the clip those that were made up; all those of missing frames are."""
        frames = len(self.macroblocks) + self.missing_frames
        return (sum(self.macroblocks) + self.missing_frames * self.total // frames) / self.total

    def __bool__(self) -> bool:
        return bool(self.missing_frames or self.surplus_frames or self.wrong_size or any(self.macroblocks))


def decode_pictures(h264: bytes) -> Iterator["av.VideoFrame"]:
    """The pictures of a raw stream, whatever can be had of it; none if there is nothing."""
    return (picture for picture, _ in _decode(h264, None))


def decode_rgb(h264: bytes, frames: np.ndarray) -> int:
    """Writes the pictures of a raw stream into `frames`, uint8 [at most so many, height, width, 3], and
    returns how many there were. Those of another size are left out."""
    reformatter = _reformatter()
    room, height, width, channels = frames.shape
    count = 0
    for picture in decode_pictures(h264):
        if (picture.width, picture.height) == (width, height):
            (plane,) = reformatter.reformat(picture, format="rgb24").planes
            rows = np.frombuffer(plane, np.uint8).reshape(height, plane.line_size)
            frames[count] = rows[:, : width * channels].reshape(height, width, channels)
            count += 1
        if count == room:
            break
    return count


def _reformatter() -> Any:
    """One a thread: making its tables takes as long as half of a clip."""
    if not hasattr(_thread, "reformatter"):
        _thread.reformatter = pyav().video.reformatter.VideoReformatter()
    return _thread.reformatter


def decode_reported(h264: bytes, frames: int, size: tuple[int, int], macroblocks: int) -> Concealment:
    """What is made up when a raw stream is decoded to a clip.

    Args:
        frames: of a clip.
        size: of a frame in pixels.
        macroblocks: of a frame.
    """
    logging = pyav().logging
    with _logging:
        before = logging.get_level()
        logging.set_level(logging.DEBUG)
        try:
            with logging.Capture() as logs:
                decoded = list(_decode(h264, logs))
        finally:
            logging.set_level(before)
    fitting = [count for picture, count in decoded if (picture.width, picture.height) == size]
    return Concealment(
        missing_frames=max(0, frames - len(fitting)),
        surplus_frames=max(0, len(fitting) - frames),
        wrong_size=len(decoded) - len(fitting),
        macroblocks=tuple(fitting[:frames]),
        total=frames * macroblocks,
    )


def _decode(h264: bytes, logs: list | None) -> Iterator[tuple["av.VideoFrame", int]]:
    """Pictures, each with the number of its macroblocks that were made up as far as `logs` say."""
    av = pyav()
    context = av.CodecContext.create("h264", "r")
    context.thread_count = 1
    for packet in [*context.parse(h264), *context.parse(None), None]:
        if logs:
            logs.clear()
        try:
            decoded = context.decode(packet)
        except av.FFmpegError:  # nothing to be had of this one
            continue
        concealed = 0
        for _, _, message in logs or ():
            found = _CONCEALED.search(message)
            if found:
                concealed += max(map(int, found.groups()))
        yield from ((picture, concealed) for picture in decoded)
