"""Made-up videos for the tests, and ffmpeg's command line as their oracle."""

import shutil
import subprocess
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

FFMPEG = shutil.which("ffmpeg")
needs_ffmpeg = pytest.mark.skipif(FFMPEG is None, reason="ffmpeg, the oracle, is not installed")

# The command of the paper's appendix D; the last two options say what its .h264 file implies.
FILTERS = "fps=3,scale=256:144:force_original_aspect_ratio=decrease,pad=256:144:(ow-iw)/2:(oh-ih)/2"
PAPER = (
    f"-vf {FILTERS} -t 5 -c:v libx264 -pix_fmt yuv420p -profile:v baseline -qp 37 -bf 0 -an -sn "
    "-x264opts slice-max-mbs=1 -trellis 0 -me_method dia -threads 1 -subq 0 -psy 0 -mixed-refs 0 "
    "-fast-pskip 0 -partitions none -refs 3 -bsf:v h264_mp4toannexb -f h264 -"
)


def ffmpeg(*arguments: str | Path, content: bytes = b"") -> bytes:
    """What ffmpeg writes to its standard output."""
    assert FFMPEG
    command = [FFMPEG, "-v", "error", "-nostdin" if not content else "-y", *map(str, arguments)]
    return subprocess.run(command, input=content or None, stdout=subprocess.PIPE, check=True).stdout


def paper_stream(path: Path, *options: str) -> bytes:
    """The stream that ffmpeg makes of a video with the paper's command, and these options for its input."""
    return ffmpeg(*options, "-i", path, *PAPER.split())


def moving(count: int, width: int = 64, height: int = 48) -> np.ndarray:
    """A square that moves over a gradient, uint8 [count, height, width, 3]."""
    frames = np.empty((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 255, width)
    frames[..., 1] = np.linspace(0, 255, height)[:, None]
    for i, frame in enumerate(frames):
        frame[..., 2] = 8 * i % 256
        left, top = 2 * i % (width - 8), i % (height - 8)
        frame[top : top + 8, left : left + 8] = (255, 255, 0)
    return frames


def write_video(
    path: Path,
    frames: Iterable[np.ndarray],
    rate: int = 10,
    times: Iterable[Fraction] | None = None,
    codec: str = "libx264",
    rotation: int = 0,
    sound: float = 0.0,
    pix_fmt: str = "yuv420p",
) -> Path:
    """Writes a video in the format of its suffix.

    Args:
        frames: uint8 [height, width, 3] each.
        times: of the frames in seconds; else i / rate.
        rotation: degrees, as a phone notes it.
        sound: seconds of silence beside it.
    """
    frames = list(frames)
    with av.open(str(path), "w") as container:
        if frames:
            stream = container.add_stream(codec, rate=rate)
            stream.height, stream.width = frames[0].shape[:2]
            stream.pix_fmt = pix_fmt
            stream.codec_context.time_base = tick = Fraction(1, rate) if times is None else Fraction(1, 1000)
            if rotation:
                stream.set_display_rotation(rotation)
        if sound:
            # AAC begins before time 0, on which versions of FFmpeg disagree in a .mkv.
            audio = container.add_stream("flac" if path.suffix == ".mkv" else "aac", rate=8000, layout="mono")
            form, kind = ("s16", np.int16) if path.suffix == ".mkv" else ("fltp", np.float32)
            for start in range(0, int(8000 * sound), 1024):
                block = av.AudioFrame.from_ndarray(np.zeros((1, 1024), kind), form, "mono")
                block.sample_rate, block.pts = 8000, start
                container.mux(audio.encode(block))
            container.mux(audio.encode(None))
        times = times or [Fraction(i, rate) for i in range(len(frames))]
        for frame, time in zip(frames, times, strict=True):
            picture = av.VideoFrame.from_ndarray(frame, "rgb24")
            picture.pts, picture.time_base = round(time / tick), tick
            container.mux(stream.encode(picture))
        if frames:
            container.mux(stream.encode(None))
    return path
