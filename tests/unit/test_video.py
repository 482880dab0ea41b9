"""Videos of every kind to frames, against ffmpeg's command line, and what cannot be used."""

import io
import subprocess
import sys
from fractions import Fraction
from itertools import islice

import av
import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import AvcCodec
from megatron_codec.codecs.nal import nal_units
from megatron_codec.codecs.video import BestEffortTime, Canvas, VideoError, video_frames
from megatron_codec.errors import UserError
from tests.videos import ffmpeg, moving, needs_ffmpeg, paper_stream, write_video

CODEC = AvcCodec()
CANVAS = Canvas(256, 144, 3)


def slices(stream: bytes) -> list[bytes]:
    return [stream[unit.start : unit.end] for unit in nal_units(stream) if unit.is_slice]


def luma(source, count: int = 15, canvas: Canvas = CANVAS) -> np.ndarray:
    """Brightness of the first frames, uint8 [n, height, width]."""
    frames = islice(video_frames(source, canvas), count)
    return np.stack([frame.picture.to_ndarray()[: canvas.height] for frame in frames])


# A variable rate: a burst, a pause of a second and a half, and times that are on no grid.
IRREGULAR = [Fraction(n, 1000) for n in (0, 10, 20, 400, 433, 1100, 2600, 2650, 3333, 4000, 4100, 5200, 5900)]

SOURCES = {
    "variable rate.mkv": lambda path: write_video(path, moving(13), times=IRREGULAR),
    "late video.mp4": lambda path: write_video(
        path, moving(60), times=[Fraction(23 + i, 10) for i in range(60)], sound=9.0
    ),
    "late video.mkv": lambda path: write_video(
        path, moving(60), times=[Fraction(23 + i, 10) for i in range(60)], sound=9.0
    ),
    "begins at 0.4.ts": lambda path: write_video(
        path, moving(60), times=[Fraction(4 + i, 10) for i in range(60)]
    ),
    "rotated 90.mp4": lambda path: write_video(path, moving(60, 96, 54), rotation=90),
    "rotated 180.mp4": lambda path: write_video(path, moving(60, 96, 54), rotation=180),
    "rotated 270.mov": lambda path: write_video(path, moving(60, 96, 54), rotation=270),
    "raw.h264": lambda path: write_video(path, moving(170), rate=25),  # has no times at all
    "tiny.mp4": lambda path: write_video(path, moving(60, 16, 16)),
    "odd size.mkv": lambda path: write_video(path, moving(60, 97, 31), codec="ffv1", pix_fmt="bgr0"),
    "tall.mkv": lambda path: write_video(path, moving(60, 40, 300), codec="ffv1"),
    "one a second.mkv": lambda path: write_video(path, moving(7), rate=1),
    "sixty a second.mp4": lambda path: write_video(path, moving(310), rate=60),
    "animation.gif": lambda path: write_video(path, moving(60), codec="gif", pix_fmt="rgb8"),
    "4K.mp4": lambda path: write_video(path, moving(11, 3840, 2160), rate=2),
    "a colon: in the name.mp4": lambda path: write_video(path, moving(60)),
}


@needs_ffmpeg
@pytest.mark.parametrize("name", SOURCES)
def test_streams_of_any_source_are_those_of_ffmpeg(name, tmp_path):
    path = SOURCES[name](tmp_path / name)
    theirs = slices(paper_stream(f"file:{path}"))
    assert len(theirs) == 15 * 144
    assert slices(CODEC.encode(path)) == theirs
    with open(path, "rb") as file:
        assert slices(CODEC.encode(file)) == theirs


@needs_ffmpeg
def test_full_range_is_made_limited(tmp_path):
    """Newer versions of swscale round this conversion otherwise than ffmpeg 5."""
    path = write_video(tmp_path / "phone.mkv", moving(60, 256, 144), codec="mjpeg", pix_fmt="yuvj420p")
    command = "-vf fps=3 -t 5 -pix_fmt yuv420p -f rawvideo -".split()
    theirs = np.frombuffer(ffmpeg("-i", path, *command), np.uint8).reshape(15, 216, 256)[:, :144]
    assert np.abs(luma(path).astype(int) - theirs).max() <= 1
    assert luma(path).max() <= 235


def test_a_phones_clip_is_upright(tmp_path):
    upright = luma(write_video(tmp_path / "a.mp4", moving(60, 144, 256)))
    turned = np.rot90(moving(60, 144, 256), axes=(1, 2))
    path = write_video(tmp_path / "b.mp4", turned, rotation=-90)
    assert np.abs(luma(path).astype(int) - upright).mean() < 1
    mirrored = write_video(tmp_path / "c.mp4", turned, rotation=90)
    assert np.abs(luma(mirrored).astype(int) - upright).mean() > 10


def test_what_does_not_fill_the_picture_is_black(tmp_path):
    frames = luma(write_video(tmp_path / "square.mp4", np.full((60, 32, 32, 3), 255, np.uint8)))
    assert (frames[:, :, 60:196] > 200).all()
    assert (frames[:, :, :56] == 16).all() and (frames[:, :, 200:] == 16).all()


def test_a_video_that_changes_its_size_goes_on(tmp_path):
    first = write_video(tmp_path / "a.h264", moving(75, 64, 64), rate=25).read_bytes()
    second = write_video(tmp_path / "b.h264", moving(75, 64, 32), rate=25).read_bytes()
    path = tmp_path / "both.h264"
    path.write_bytes(first + second)
    frames = luma(path)
    assert len(frames) == 15
    assert (frames[:8, 72, :50] == 16).all() and (frames[10:, 3, :] == 16).all()
    assert (frames[10:, 72, 10:50] > 16).all()


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([(0, 0), (1, 1), (2, 2)], [0, 1, 2]),
        ([(None, 0), (None, 1), (None, 2)], [0, 1, 2]),
        ([(None, None), (None, None), (None, None)], [0, 3, 6]),
        ([(5, None), (None, None), (9, None)], [5, 8, 9]),
        # Presentation times that go backwards lose against decoding times that do not.
        ([(4, 0), (2, 1), (3, 2), (1, 3)], [4, 1, 2, 3]),
        ([(4, 7), (5, 7), (6, 7)], [4, 5, 6]),
    ],
)
def test_best_effort_times(times, expected):
    best_effort = BestEffortTime()
    assert [best_effort(pts, dts, 3) for pts, dts in times] == expected


def picture_file(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(moving(1)[0]).save(buffer, form)
    return buffer.getvalue()


def without_index(content: bytes) -> bytes:
    """An .mp4 whose end, with the index, is missing."""
    return content[: content.index(b"moov") - 4]


def video_bytes(path, *arguments, **options) -> bytes:
    return write_video(path, *arguments, **options).read_bytes()


BAD = {
    "text.mp4": (lambda p: b"not a video at all, but long enough to be looked at\n" * 50, "not a video"),
    "empty.mp4": (lambda p: b"", "not a video"),
    "noise.avi": (lambda p: np.random.default_rng(1).bytes(5000), "not a video"),
    "sound.mp4": (lambda p: video_bytes(p, [], sound=2.0), "no video"),
    "still.png": (lambda p: picture_file("PNG"), "still picture"),
    "still.jpg": (lambda p: picture_file("JPEG"), "still picture"),
    "one frame.mp4": (lambda p: video_bytes(p, moving(1)), "still picture"),
    "short.mp4": (lambda p: video_bytes(p, moving(30)), "too short"),
    "cut index.mp4": (lambda p: without_index(video_bytes(p, moving(60))), "not a video"),
    "cut frame.mkv": (lambda p: video_bytes(p, moving(60))[:4000], "too short"),
    "playlist.m3u8": (lambda p: b"#EXTM3U\n#EXT-X-VERSION:3\n#EXTINF:5,\nother.ts\n#EXT-X-ENDLIST\n",
                      "not a video"),
    "script.txt": (lambda p: b"ffconcat version 1.0\nfile other.mp4\n", "not a video"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_used_is_refused_by_kind(name, tmp_path):
    make, kind = BAD[name]
    path = tmp_path / name
    content = make(path)
    path.write_bytes(content)
    write_video(tmp_path / "other.ts", moving(60))
    write_video(tmp_path / "other.mp4", moving(60))
    for source in (path, io.BytesIO(content)):
        with pytest.raises(VideoError) as fault:
            CODEC.encode(source, pad_short=kind != "too short")
        assert fault.value.kind == kind, fault.value
        assert str(path) in str(fault.value) or source is not path


def test_a_video_without_a_frame(tmp_path):
    """The index of a file is there, its frames are not."""
    path = write_video(tmp_path / "video.mp4", moving(60))
    content = bytearray(path.read_bytes())
    start = content.index(b"mdat") + 4
    content[start : content.index(b"moov") - 4] = bytes(content.index(b"moov") - 4 - start)
    path.write_bytes(content)
    with pytest.raises(VideoError, match="without a") as fault:
        CODEC.encode(path)
    assert fault.value.kind == "no frames"


def test_a_video_cut_within_a_frame_behind_the_clip_is_good(tmp_path):
    content = write_video(tmp_path / "video.mkv", moving(100)).read_bytes()
    with av.open(io.BytesIO(content)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        ends = [packet.pos for packet in packets if packet.pts * packet.time_base >= 6]
    whole = CODEC.encode(io.BytesIO(content))
    assert min(ends) + 5 < len(content)
    assert CODEC.encode(io.BytesIO(content[: min(ends) + 5])) == whole


def test_too_many_pixels_are_refused(tmp_path):
    path = write_video(tmp_path / "a.mp4", moving(60))
    with pytest.raises(
        VideoError, match="64x48: has 3,072 pixels a frame, above the limit of 3,000"
    ) as fault:
        next(CODEC.encode_clips(path, max_pixels=3000))
    assert fault.value.kind == "too many pixels"


def test_missing_files_stay_missing(tmp_path):
    with pytest.raises(FileNotFoundError):
        CODEC.encode(tmp_path / "no.mp4")


def test_without_pyav_the_remedy_is_named(tmp_path):
    code = """
import sys
sys.modules["av"] = None
from megatron_codec.codecs import AvcCodec, JpegCodec, get_codec
assert get_codec("avc") == AvcCodec()
JpegCodec().head
AvcCodec().head
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "pip install 'megatron_codec[video]'" in done.stderr
    assert issubclass(UserError, ValueError)
