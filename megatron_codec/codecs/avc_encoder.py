"""Frames to H.264 byte streams with x264 (package `av`), as the ffmpeg command of AVC-LM writes them."""

import re
from collections.abc import Sequence
from fractions import Fraction

from megatron_codec.codecs.video_graph import Canvas, CanvasFrame, pyav

# The paper's flags, by the names of FFmpeg's wrapper of x264; without B-frames.
_X264 = {
    "profile": "baseline",
    "bf": "0",
    "x264opts": "slice-max-mbs=1",
    "trellis": "0",
    "me_method": "dia",
    "subq": "0",
    "psy": "0",
    "mixed-refs": "0",
    "fast-pskip": "0",
    "partitions": "none",
    "refs": "3",
}


_VERSION = re.compile(rb"x264 - core (\d+(?: r\d+ \w+)?)")


def x264_version(stream: bytes) -> str:
    """The version that x264 notes in the SEI text of a stream of its own."""
    found = _VERSION.search(stream)
    return found.group(1).decode() if found else "unknown"


def encode_h264(frames: Sequence[CanvasFrame], canvas: Canvas, qp: int, with_look: bool = False) -> bytes:
    """The stream as x264 writes it: SPS, PPS and its SEI text, then the slices.

    Args:
        canvas: of the frames.
        qp: the constant quantizer.
        with_look: note the shape of the source's pixels and its colour space in the SPS, as ffmpeg does.
    """
    av = pyav()
    context = av.CodecContext.create("libx264", "w")
    context.width, context.height, context.pix_fmt = canvas.width, canvas.height, "yuv420p"
    context.time_base, context.framerate = Fraction(1, canvas.fps), Fraction(canvas.fps)
    context.thread_count = 1
    context.options = _X264 | {"qp": str(qp)}
    if with_look:
        first = frames[0]
        if first.aspect:
            context.sample_aspect_ratio = first.aspect
        for name in ("color_range", "color_primaries", "color_trc", "colorspace"):
            setattr(context, name, getattr(first.picture, name))
    packets = []
    for number, frame in enumerate(frames):
        frame.picture.pts, frame.picture.time_base = number, context.time_base
        frame.picture.pict_type = av.video.frame.PictureType.NONE  # or x264 would repeat the source's types
        packets += context.encode(frame.picture)
    return b"".join(map(bytes, packets + context.encode(None)))
