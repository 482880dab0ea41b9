"""Clips as files that players and browsers open."""

import io
from fractions import Fraction
from typing import Literal

import numpy as np
from PIL import Image

from megatron_codec.codecs.base import DecodeError
from megatron_codec.codecs.video_graph import pyav


def mux_mp4(h264: bytes, fps: int) -> bytes:
    """An .mp4 file with the pictures of a sound raw stream, as they are. Raises DecodeError."""
    av = pyav()
    buffer = io.BytesIO()
    try:
        with (
            av.open(io.BytesIO(h264), format="h264") as raw,
            av.open(buffer, "w", format="mp4", options={"fflags": "bitexact"}) as mp4,
        ):
            source = raw.streams.video[0]
            target = mp4.add_stream_from_template(source)
            target.time_base = Fraction(1, fps)
            packets = (packet for packet in raw.demux(source) if packet.size)
            for number, packet in enumerate(packets):
                packet.stream, packet.time_base = target, Fraction(1, fps)
                packet.pts = packet.dts = number
                packet.duration = 1
                mp4.mux(packet)
    except av.FFmpegError as error:
        raise DecodeError(f"stream of {len(h264)} bytes", f"cannot be put into a file: {error}") from error
    return buffer.getvalue()


def animation(frames: np.ndarray, fps: int, form: Literal["WEBP", "GIF", "PNG"] = "WEBP") -> bytes:
    """An animated picture that plays for ever.

    Args:
        frames: uint8 [n, height, width, 3].
        form: WEBP and PNG keep every pixel, GIF has 256 colours.
    """
    first, *others = [Image.fromarray(frame) for frame in frames]
    buffer = io.BytesIO()
    options = {"lossless": True} if form == "WEBP" else {}
    first.save(
        buffer, form, save_all=True, append_images=others, duration=round(1000 / fps), loop=0, **options
    )
    return buffer.getvalue()
