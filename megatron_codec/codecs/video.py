r"""Any video made canonical: upright, a fixed rate and size, YUV 4:2:0 of 8 bits, black where it does not
fill the picture. The video codecs see only such frames, as `images.py` is for pictures.

Frames are those of

    ffmpeg -i FILE -vf "fps=3,scale=256:144:force_original_aspect_ratio=decrease,\
        pad=256:144:(ow-iw)/2:(oh-ih)/2" ...

with its choice of stream, its best-effort timestamps, its rotation and its constant frame rate.
"""

import contextlib
import os
from collections.abc import Iterable, Iterator
from fractions import Fraction
from functools import cache
from typing import IO, Any

import numpy as np

from megatron_codec.codecs.video_graph import Canvas, CanvasFrame, Graph, pyav
from megatron_codec.errors import UserError

# 4096x2304, the largest picture of H.264's level 5.2 (table A-1).
MAX_PIXELS = 9_437_184

# Playlists and scripts name other files, which whoever gave the video need not be allowed to read.
_EXCLUDED_FORMATS = {"concat", "dash", "ffmetadata", "hls", "imf", "lavfi", "rtsp", "sap", "sdp", "tty"}
_MICROSECOND = Fraction(1, 1_000_000)

Source = str | os.PathLike | IO[bytes]


class VideoError(UserError):
    """A video that cannot be used.

    Args:
        kind: a few words that are the same for all faults of the kind, to be counted.
    """

    def __init__(self, kind: str, value: str, rule: str, remedy: str = ""):
        self.kind = kind
        super().__init__(value, rule, remedy)

    def __reduce__(self):
        return type(self), (self.kind, self.value, self.rule, self.remedy)


def video_frames(source: Source, canvas: Canvas, max_pixels: int = MAX_PIXELS) -> Iterator[CanvasFrame]:
    """The frames of a video on the canvas, the first at time 0, without gaps.

    Damaged parts are passed over as ffmpeg does, so a truncated file gives the frames before its end.

    Args:
        source: a path, or a file open for reading in binary mode that can seek.
        max_pixels: videos with more, in width times height, are refused.

    Raises VideoError for what is not a video, has none in it, or has not a single frame.
    """
    name = source_name(source)
    with _opened(source, name) as container:
        stream = _best_stream(container, name)
        width, height = stream.codec_context.width, stream.codec_context.height
        if width * height > max_pixels:
            rule = f"has {width * height:,} pixels a frame, above the limit of {max_pixels:,}"
            raise VideoError("too many pixels", f"{name}: {width}x{height}", rule)
        stream.codec_context.thread_count = 1  # videos are worked on side by side
        aspect = stream.sample_aspect_ratio or stream.codec_context.sample_aspect_ratio
        grid, graph = _Grid(), None
        for frame in _timed_frames(container, stream):
            if graph is None or not graph.takes(frame):  # a video may change its size
                if graph is not None:
                    yield from grid.place(graph.flush())
                graph = Graph(frame, aspect, canvas)
            yield from grid.place(graph.push(frame))
        if graph is None:
            raise VideoError("no frames", name, "has a video stream without a frame that decodes")
        yield from grid.place(graph.flush())


def array_frames(array: np.ndarray, canvas: Canvas) -> Iterator[CanvasFrame]:
    """The frames of an array on the canvas, whose frame rate it is taken to have.

    Args:
        array: uint8 [frames, height, width, 3], RGB.

    Raises UserError for an array of another shape or type.
    """
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] != 3 or not array.size:
        rule = "a clip is uint8 [frames, height, width, 3]"
        raise UserError(f"array of {array.dtype} {list(array.shape)}", rule)
    graph = None
    for number, picture in enumerate(array):
        frame = pyav().VideoFrame.from_ndarray(np.ascontiguousarray(picture), format="rgb24")
        frame.pts, frame.time_base, frame.duration = number, Fraction(1, canvas.fps), 1
        graph = graph or Graph(frame, None, canvas)
        yield from graph.push(frame)
    assert graph is not None
    yield from graph.flush()


def source_name(source: Source) -> str:
    """What messages call a source."""
    if isinstance(source, str | os.PathLike):
        return os.fspath(source)
    return str(getattr(source, "name", "the video"))


class BestEffortTime:
    """The time of each frame from what container and decoder say of it, which may be nothing or wrong.

    Presentation times are believed until they have gone backwards more often than decoding times (the rule of
    FFmpeg's `best_effort_timestamp`, which PyAV does not show). Where there is neither, a frame follows the
    one before it.
    """

    def __init__(self) -> None:
        self._pts = self._dts = -(1 << 63)
        self._faulty_pts = self._faulty_dts = 0
        self._next = 0

    def __call__(self, pts: int | None, dts: int | None, duration: int) -> int:
        """The frame's time; all in the units of the stream."""
        if dts is not None:
            self._faulty_dts += dts <= self._dts
        if pts is not None:
            self._faulty_pts += pts <= self._pts
        self._dts = dts if dts is not None else pts if pts is not None else self._dts
        self._pts = pts if pts is not None else dts if dts is not None else self._pts
        if pts is not None and (dts is None or self._faulty_pts <= self._faulty_dts):
            time = pts
        else:
            time = self._next if dts is None else dts
        self._next = time + max(1, duration)
        return time


class _Grid:
    """Constant frame rate from time 0 on: what begins late is preceded by copies of its first frame, gaps are
    filled with the frame before them, and what comes for a time that has passed is dropped."""

    def __init__(self) -> None:
        self._next = 0
        self._last: CanvasFrame | None = None

    def place(self, frames: Iterable[CanvasFrame]) -> Iterator[CanvasFrame]:
        """The frames that stand on the grid now that these have come."""
        for frame in frames:
            time = frame.picture.pts
            assert time is not None
            while self._next <= time:
                yield frame if self._last is None or self._next == time else self._last
                self._next += 1
            self._last = frame


@contextlib.contextmanager
def _opened(source: Source, name: str) -> Iterator[Any]:
    av = pyav()
    # "file:" keeps a colon in a name from being taken for a protocol.
    file = f"file:{os.fspath(source)}" if isinstance(source, str | os.PathLike) else source
    options = {"protocol_whitelist": "file", "format_whitelist": _formats()}
    try:
        container = av.open(file, options=options, metadata_errors="replace")
    except (FileNotFoundError, PermissionError, IsADirectoryError) as error:  # of PyAV's own kinds
        raise OSError(error.errno, os.strerror(error.errno or 0), name) from error
    except (av.FFmpegError, ValueError) as error:
        raise VideoError("not a video", name, f"cannot be opened as a video: {_reason(error)}") from error
    with container:
        yield container


@cache
def _formats() -> str:
    """FFmpeg's names of the formats that are opened."""
    return ",".join(sorted(pyav().formats_available - _EXCLUDED_FORMATS))


def _best_stream(container: Any, name: str) -> Any:
    """The stream that ffmpeg takes: most pixels, those marked as default first; no cover pictures."""
    av = pyav()
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
    if not streams:
        rule = "has no video stream" + (", only sound" if container.streams.audio else "")
        raise VideoError("no video", name, rule)

    def score(stream: Any) -> int:
        context = stream.codec_context
        is_default = bool(stream.disposition & av.stream.Disposition.default)
        return context.width * context.height + 5_000_000 * is_default

    best = max(streams, key=score)
    if best.codec_context is None or not best.codec_context.width:
        raise VideoError("no frames", name, "has a video stream without a size")
    return best


def _timed_frames(container: Any, stream: Any) -> Iterator[Any]:
    """Decoded frames with best-effort times, counted from the beginning of the file."""
    av = pyav()
    best_effort = BestEffortTime()
    shift = round((container.start_time or 0) * _MICROSECOND / stream.time_base)
    rate = stream.guessed_rate or stream.average_rate
    usual = round(1 / rate / stream.time_base) if rate else 1
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets, None)
        except av.FFmpegError:  # the file ends within a packet
            packet = None
        try:
            decoded = stream.codec_context.decode(packet)
        except av.FFmpegError:  # a broken packet; the next may be whole
            decoded = []
        for frame in decoded:
            duration = frame.duration or usual
            frame.pts = best_effort(frame.pts, frame.dts, duration) - shift
            frame.duration = duration
            yield frame
        if packet is None or packet.size == 0:
            return


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
