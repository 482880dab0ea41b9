"""Frames of any size and format onto a canvas, with FFmpeg's filters (package `av`)."""

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from megatron_codec.errors import UserError

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class Canvas:
    """Size in pixels and frames a second that videos are brought to."""

    width: int
    height: int
    fps: int

    @property
    def filters(self) -> str:
        """The paper's filter graph (Han et al. 2024, appendix D), whose limited range is said here: FFmpeg 5
        comes to it by itself, newer ones keep a full range."""
        size = f"{self.width}:{self.height}"
        fit = f"scale={size}:force_original_aspect_ratio=decrease:out_range=tv"
        return f"fps={self.fps},{fit},pad={size}:(ow-iw)/2:(oh-ih)/2"


class CanvasFrame(NamedTuple):
    """A frame on the canvas.

    Args:
        picture: YUV 4:2:0 of 8 bits in limited range; `pts` counts frames.
        aspect: width of a pixel over its height as ffmpeg would note it, None if the source does not say it.
    """

    picture: "av.VideoFrame"
    aspect: Fraction | None


def pyav() -> Any:
    """The package `av`. Raises UserError where it is not installed."""
    try:
        import av
        import av.filter  # these are no part of `import av`
        import av.video.reformatter
    except ImportError as error:
        remedy = "pip install 'megatron_codec[video]'"
        raise UserError(
            "the codec 'avc'", f"needs PyAV, which cannot be imported: {error}", remedy
        ) from error
    return av


class Graph:
    """A filter graph from frames like `first` to the canvas.

    Args:
        aspect: of the pixels of the source, None or 0 if unknown.
    """

    def __init__(self, first: Any, aspect: Fraction | None, canvas: Canvas):
        self._shape = first.width, first.height, first.format.name
        self._graph = graph = pyav().filter.Graph()
        if hasattr(graph, "threads"):  # PyAV 18
            graph.threads = 1
        source = graph.add(
            "buffer",
            video_size=f"{first.width}x{first.height}",
            pix_fmt=first.format.name,
            time_base=str(first.time_base),
            pixel_aspect=str(aspect or 0).replace("/", ":"),
            colorspace=str(int(first.colorspace)),
            range=str(int(first.color_range)),
        )
        upright = _upright(first)
        nodes = [source]
        for part in [*upright, *canvas.filters.split(","), "format=yuv420p"]:
            name, _, arguments = part.partition("=")
            nodes.append(graph.add(name, arguments or None))
        graph.link_nodes(*nodes, graph.add("buffersink")).configure()
        width, height = first.width, first.height
        if any(part.startswith("transpose") for part in upright):
            width, height, aspect = height, width, 1 / aspect if aspect else None
        self._aspect = aspect * _stretch(width, height, canvas) if aspect else None

    def takes(self, frame: Any) -> bool:
        """Whether a frame is like the first."""
        return self._shape == (frame.width, frame.height, frame.format.name)

    def push(self, frame: Any) -> Iterator[CanvasFrame]:
        """What comes out when this frame goes in; None ends the video."""
        av = pyav()
        self._graph.vpush(frame)
        with contextlib.suppress(av.BlockingIOError, av.EOFError):
            while True:
                yield CanvasFrame(self._graph.vpull(), self._aspect)

    def flush(self) -> Iterator[CanvasFrame]:
        """What is left at the end."""
        return self.push(None)


def _stretch(width: int, height: int, canvas: Canvas) -> Fraction:
    """By how much a picture's pixels change their aspect when it is made to fit: rounding, no more."""

    def scaled(length: int, numerator: int, denominator: int) -> int:
        return (2 * length * numerator + denominator) // (2 * denominator)

    fitted_width = min(canvas.width, scaled(canvas.height, width, height))
    fitted_height = min(canvas.height, scaled(canvas.width, height, width))
    return Fraction(fitted_height * width, fitted_width * height)


def _upright(frame: Any) -> list[str]:
    """The filters that turn and mirror a frame as its display matrix says."""
    content = frame.side_data.get("DISPLAYMATRIX")
    if content is None:
        return []
    a, b, _, c, d = np.frombuffer(bytes(content), np.int32)[:5].tolist()
    turn = round(math.degrees(math.atan2(b / (math.hypot(b, d) or 1), a / (math.hypot(a, c) or 1)))) % 360
    if turn == 90:
        return ["transpose=clock" if c < 0 else "transpose=cclock_flip"]
    if turn == 270:
        return ["transpose=clock_flip" if c < 0 else "transpose=cclock"]
    if turn in (0, 180):
        return ["hflip"] * (a < 0) + ["vflip"] * (d < 0)
    return [f"rotate={turn}*PI/180"]
