"""The AVC codec against ffmpeg's command line with the paper's flags, and against damage of every kind."""

import io
import json
from dataclasses import replace
from itertools import pairwise

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_codec.codecs import AvcCodec, Codec, DecodeError, Report, get_codec
from megatron_codec.codecs.avc_files import animation
from megatron_codec.codecs.nal import IDR_SLICE, SEI, nal_units, picture_starts
from megatron_codec.codecs.video import VideoError
from megatron_codec.errors import UserError
from tests.data_sources import DEBIAN_VIDEOS, VIDEOS, debian_video, real_video
from tests.videos import FILTERS, ffmpeg, moving, needs_ffmpeg, paper_stream

CODEC = AvcCodec()
WITHOUT_HEAD = AvcCodec(remove_head=True)
PAPER = AvcCodec(paper_bytes=True)
SMALL = AvcCodec(frames=4, width=48, height=32)


def slices(stream: bytes) -> list[bytes]:
    """The slices with their start codes."""
    return [stream[unit.start : unit.end] for unit in nal_units(stream) if unit.is_slice]


def without_sei(stream: bytes) -> bytes:
    units = nal_units(stream)
    return b"".join(stream[unit.start : unit.end] for unit in units if unit.type != SEI)


@pytest.fixture(scope="module")
def bikes() -> bytes:
    """A clip with a cut in it: its fifth frame begins with parameter sets again."""
    return CODEC.encode(real_video("bikes.mp4"))


@pytest.fixture(scope="module")
def small() -> bytes:
    return SMALL.encode(moving(4, 48, 32))


@needs_ffmpeg
@pytest.mark.parametrize("name", VIDEOS)
def test_streams_are_those_of_ffmpeg(name):
    path = real_video(name)
    theirs = paper_stream(path)
    ours = CODEC.encode(path, pad_short=True)
    count = len(slices(theirs))
    assert count == (15 if path.stem in ("bikes", "bigbuckbunny") else 12) * 144
    assert slices(ours)[:count] == slices(theirs)
    if count == 15 * 144:
        assert without_sei(PAPER.encode(path)) == without_sei(theirs)
    rgb = ffmpeg("-f", "h264", "-i", "-", "-f", "rawvideo", "-pix_fmt", "rgb24", "-", content=ours)
    np.testing.assert_array_equal(CODEC.decode(ours), np.frombuffer(rgb, np.uint8).reshape(15, 144, 256, 3))


@needs_ffmpeg
@pytest.mark.parametrize("name", DEBIAN_VIDEOS)
def test_streams_of_more_videos_are_those_of_ffmpeg(name, tmp_path):
    content = debian_video(name)
    if content is None:
        pytest.skip("Debian's package opencv-doc is not here")
    path = tmp_path / name
    path.write_bytes(content)
    theirs = paper_stream(path)
    if name in ("vtest.avi", "Megamind_bugy.avi"):
        # ffmpeg 5 decodes MPEG-4 with other roundings than FFmpeg 8, and reads other times of a broken AVI
        # file: from the same frames on, all is equal.
        raw = ffmpeg("-i", path, "-vf", FILTERS, "-t", "5", "-pix_fmt", "yuv420p", "-f", "rawvideo", "-")
        frames = tmp_path / "frames.y4m"
        frames.write_bytes(y4m(raw, 256, 144))
        path = frames
    ours = CODEC.encode(path)
    assert slices(ours) == slices(theirs)
    assert ours[: len(CODEC.head)] == CODEC.head
    if path.suffix != ".y4m":
        assert without_sei(PAPER.encode(path)) == without_sei(theirs)


def y4m(raw: bytes, width: int, height: int) -> bytes:
    """Raw YUV 4:2:0 frames at 3 a second as a file."""
    size = width * height * 3 // 2
    frames = [raw[i : i + size] for i in range(0, len(raw), size)]
    head = f"YUV4MPEG2 W{width} H{height} F3:1 Ip A0:0 C420jpeg\n".encode()
    return head + b"".join(b"FRAME\n" + frame for frame in frames)


@needs_ffmpeg
def test_a_later_clip_is_that_of_ffmpeg():
    path = real_video("bikes.mp4")
    first, second = CODEC.encode_clips(path, clips=None)
    assert slices(first) == slices(paper_stream(path))
    assert slices(second) == slices(paper_stream(path, "-ss", "5"))


def test_a_stream_is_one_slice_a_macroblock(bikes):
    units = nal_units(bikes)
    assert [unit.type for unit in units[:3]] == [7, 8, IDR_SLICE]
    assert sum(unit.is_slice for unit in units) == 15 * 144
    assert not any(unit.type == SEI for unit in units)
    assert bikes.startswith(CODEC.preamble) and CODEC.preamble == CODEC.head
    assert bikes.count(CODEC.head) == 2  # the cut
    assert CODEC.check(bikes) == Report(True)
    assert CODEC.to_h264(bikes) == bikes


def test_the_head_comes_back(bikes):
    path = real_video("bikes.mp4")
    stream = WITHOUT_HEAD.encode(path)
    assert len(stream) == len(bikes) - 2 * len(CODEC.head)
    assert WITHOUT_HEAD.preamble == b""
    assert WITHOUT_HEAD.to_h264(stream) == bikes
    assert WITHOUT_HEAD.check(stream) == Report(True)
    report = WITHOUT_HEAD.check(bikes)
    assert report == Report(False, "frame 0, macroblock 0: found SPS, expected IDR slice", 0)
    np.testing.assert_array_equal(WITHOUT_HEAD.decode(stream), CODEC.decode(bikes))


def test_the_papers_own_bytes(bikes):
    stream = PAPER.encode(real_video("bikes.mp4"))
    assert PAPER.preamble == b""
    assert [unit.type for unit in nal_units(stream)[:4]] == [7, 8, SEI, IDR_SLICE]
    assert slices(stream) == slices(bikes)
    assert PAPER.check(stream) == Report(True)
    assert not PAPER.check(bikes).valid
    assert PAPER.to_h264(stream) == stream
    np.testing.assert_array_equal(PAPER.decode(stream), CODEC.decode(bikes))


def test_settings_round_trip_and_faults_are_told_together():
    codec = AvcCodec(frames=8, fps=5, width=64, height=48, qp=30, remove_head=True)
    assert get_codec(**json.loads(json.dumps(codec.to_dict()))) == codec
    assert isinstance(codec, Codec)
    with pytest.raises(UserError) as faults:
        AvcCodec(frames=0, fps=0, width=250, height=0, qp=60, remove_head=True, paper_bytes=True)
    told = str(faults.value)
    for part in ("--frames 0", "--fps 0", "width 250", "use 256", "height 0", "use 16", "QP 60", "the head"):
        assert part in told


def test_arrays_are_clips():
    frames = moving(15, 256, 144)
    stream = CODEC.encode(frames)
    assert CODEC.check(stream) == Report(True)
    decoded = CODEC.decode(stream)
    assert decoded.shape == frames.shape and decoded.dtype == np.uint8
    assert np.abs(decoded.astype(int) - frames).mean() < 12  # QP 37
    assert CODEC.encode(frames.copy()) == stream
    sharper = AvcCodec(qp=10)
    assert np.abs(sharper.decode(sharper.encode(frames)).astype(int) - frames).mean() < 4
    assert len(list(CODEC.encode_clips(moving(45, 64, 64), clips=None))) == 3
    for array in (frames[0], frames.astype(np.float32), frames[..., :1], frames[:0]):
        with pytest.raises(UserError, match=r"a clip is uint8 \[frames, height, width, 3\]"):
            CODEC.encode(array)


def test_clips_of_a_video_and_their_stride():
    codec = replace(SMALL, frames=4)
    frames = moving(15, 48, 32)
    expected = {start: codec.encode(frames[start : start + 4]) for start in range(12)}
    for stride, starts in ((None, [0, 4, 8]), (1.0, [0, 3, 6, 9]), (2.0, [0, 6]), (1 / 3, range(12))):
        clips = list(codec.encode_clips(frames, None, stride))
        assert clips == [expected[start] for start in starts]
    assert list(codec.encode_clips(frames, 2, 1.0)) == [expected[0], expected[3]]
    with pytest.raises(UserError, match="at least one frame"):
        next(codec.encode_clips(frames, None, 0.1))


def test_short_sources_are_refused_or_padded():
    path = real_video("carphone_pristine.mp4")
    with pytest.raises(
        VideoError, match=r"has 12 frames at 3 a second, and a clip has 15; pad_short"
    ) as fault:
        CODEC.encode(path)
    assert fault.value.kind == "too short"
    stream = CODEC.encode(path, pad_short=True)
    assert CODEC.check(stream) == Report(True)
    decoded = CODEC.decode(stream).astype(int)
    assert np.abs(decoded[11] - decoded[14]).mean() < 1 < np.abs(decoded[0] - decoded[11]).mean()


@pytest.mark.parametrize("count", [0, 1, 4, 5, 10, 14, 15, 20])
def test_prompts_are_whole_frames(bikes, count):
    prompt = CODEC.first_frames(bikes, count)
    assert bikes.startswith(prompt)
    if count == 0:
        assert prompt == CODEC.head
        return
    assert len(picture_starts(prompt)) == min(count, 15)
    # What follows is the next frame from its first byte on, parameter sets before a cut included.
    rest = nal_units(bikes[len(prompt) :])
    assert len(slices(prompt)) == 144 * min(count, 15)
    if count < 15:
        assert rest[0].start == 0 and rest[0].begin == 4
    frames, concealment = CODEC.decode_reported(prompt)
    np.testing.assert_array_equal(frames[:count], CODEC.decode(bikes)[:count])
    assert concealment.missing_frames == max(0, 15 - count)
    assert not any(concealment.macroblocks)
    assert bool(concealment) == (count < 15)


def test_ratios_count_frames(bikes):
    assert [CODEC.prompt_frames(k / 15) for k in range(16)] == list(range(16))
    assert CODEC.prompt_frames(0.5) == 7
    assert CODEC.prompt(bikes, 2 / 3) == CODEC.first_frames(bikes, 10)
    with pytest.raises(UserError, match="between 0 and 1"):
        CODEC.prompt(bikes, 1.5)
    assert CODEC.whole_frames(CODEC.first_frames(bikes, 3) + bikes[-20:])[0] == 2
    assert CODEC.whole_frames(b"") == (0, b"")


def test_every_truncation_gives_the_frames_before_it(small):
    whole = SMALL.decode(small)
    ends = [*picture_starts(small)[1:], len(small)]
    for length in range(len(SMALL.head) + 8, len(small), 5):
        frames, concealment = SMALL.decode_reported(small[:length])
        complete = sum(end <= length for end in ends)
        assert frames.shape == whole.shape
        np.testing.assert_array_equal(frames[:complete], whole[:complete])
        # That the very last slice lacks its end is for the decoder to see.
        assert not SMALL.check(small[:length]).valid or length > nal_units(small)[-1].begin + 2
        if length <= nal_units(small)[-1].begin:
            assert 0 < concealment.share <= 1
    for nothing in (b"", SMALL.head, b"no stream at all" * 99):
        with pytest.raises(DecodeError, match="holds no frame of 48x32 pixels"):
            SMALL.decode(nothing)


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_damage_never_raises_and_never_changes_the_shape(small, data):
    stream = bytearray(small)
    for _ in range(data.draw(st.integers(1, 20))):
        stream[data.draw(st.integers(0, len(stream) - 1))] = data.draw(st.integers(0, 255))
    try:
        frames, concealment = SMALL.decode_reported(bytes(stream))
    except DecodeError:
        assert not SMALL.check(bytes(stream)).valid
        return
    assert frames.shape == (4, 32, 48, 3)
    assert len(concealment.macroblocks) + concealment.missing_frames == 4
    if concealment.missing_frames or concealment.surplus_frames:
        assert not SMALL.check(bytes(stream)).valid


def test_what_is_made_up_is_counted(bikes):
    parts = nal_units(bikes)

    def without(*numbers: int) -> bytes:
        return b"".join(bikes[unit.start : unit.end] for i, unit in enumerate(parts) if i not in numbers)

    frames, none = CODEC.decode_reported(bikes)
    assert not none and none.share == 0 and none.macroblocks == (0,) * 15
    one = CODEC.decode_reported(without(400))[1]
    assert one.macroblocks == (0, 0, 1) + (0,) * 12 and one.share == 1 / 2160
    lost = CODEC.decode_reported(without(*range(2 + 144, 2 + 288)))[1]
    assert lost.missing_frames == 1 and lost.share == pytest.approx(1 / 15, abs=1e-3)
    # The parameter sets cannot be lost: they are spliced in again.
    again, concealment = CODEC.decode_reported(without(0, 1))
    assert not concealment
    np.testing.assert_array_equal(again, frames)
    twice = CODEC.decode_reported(bikes + bikes)[1]
    assert twice.surplus_frames == 15 and not any(twice.macroblocks)


FAULTS = {
    "nothing": (lambda s, u: b"", "does not begin with a start code"),
    "a byte before": (lambda s, u: b"\x55" + s, "does not begin with a start code"),
    "no parameter sets": (lambda s, u: s[u[2].start :], "frame 0: found IDR slice, expected SPS"),
    "other SPS": (lambda s, u: s[:7] + b"\x15" + s[8:], "frame 0: the SPS differs from the codec's"),
    "short start code": (lambda s, u: s[1:], "frame 0: found a start code of 3 bytes, expected 4"),
    "long start code": (lambda s, u: s[: u[3].start] + b"\0" + s[u[3].start :],
                        "frame 0, macroblock 1: found a start code of 4 bytes, expected 3"),
    "lost slice": (lambda s, u: s[: u[4].start] + s[u[5].start :],
                   "frame 0, macroblock 2: first_mb_in_slice is 3, expected 2"),
    "slice twice": (lambda s, u: s[: u[5].start] + s[u[4].start :],
                    "frame 0, macroblock 3: first_mb_in_slice is 2, expected 3"),
    "end": (lambda s, u: s[: u[-1].start], "ends before frame 3, macroblock 5 of 4 frames"),
    "more": (lambda s, u: s + s[u[-1].start :], "bytes follow the last frame"),
    "frame lost": (lambda s, u: s[: u[8].start] + s[u[14].start :],
                   "frame 1, macroblock 0: frame_num is 2, expected 1"),
    "other unit": (lambda s, u: s[: u[3].begin] + b"\x06" + s[u[3].begin + 1 :],
                   "frame 0, macroblock 1: found SEI, expected IDR slice"),
    "forbidden bit": (lambda s, u: s[: u[3].begin] + b"\xe5" + s[u[3].begin + 1 :],
                      "frame 0, macroblock 1: found IDR slice, expected IDR slice"),
    "trailing zero": (lambda s, u: s + b"\0", "the NAL unit ends with a zero byte"),
    "no escape": (lambda s, u: s[:-1] + b"\0\0\2" + s[-1:],
                  "000002 without emulation prevention"),
    "bad escape": (lambda s, u: s[:-1] + b"\0\0\3\4" + s[-1:],
                   "00000304 without emulation prevention"),
    "empty unit": (lambda s, u: s[: u[3].begin] + s[u[3].end :], "frame 0, macroblock 1: a NAL unit without"),
    "header only": (lambda s, u: s[: u[3].begin + 1] + s[u[3].end :], "the slice ends within its header"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_of_structure_is_found(small, fault):
    damage, reason = FAULTS[fault]
    report = SMALL.check(damage(small, nal_units(small)))
    assert not report.valid and report.offset is not None
    assert reason in report.reason


def test_mp4_holds_the_very_slices(bikes):
    file = CODEC.to_file(bikes)
    with av.open(io.BytesIO(file)) as container:
        (stream,) = container.streams
        assert (stream.width, stream.height, stream.average_rate, stream.frames) == (256, 144, 3, 15)
        packets = [bytes(packet) for packet in container.demux(stream) if packet.size]
        stream.codec_context.flush_buffers()
    assert len(packets) == 15
    # In a file a length of 4 bytes stands where a start code was.
    contents = [bikes[unit.begin : unit.end] for unit in nal_units(bikes) if unit.is_slice]
    expected = b"".join(len(content).to_bytes(4, "big") + content for content in contents)
    held = b"".join(packets)
    for kind in (7, 8):
        (content,) = {bikes[unit.begin : unit.end] for unit in nal_units(bikes) if unit.type == kind}
        held = held.replace(len(content).to_bytes(4, "big") + content, b"")
    assert held == expected
    np.testing.assert_array_equal(shown(file), CODEC.decode(bikes))
    assert CODEC.to_file(bikes) == file


def shown(file: bytes) -> np.ndarray:
    with av.open(io.BytesIO(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_damaged_clips_become_whole_files(bikes):
    damaged = bytearray(CODEC.first_frames(bikes, 12))
    for place in range(3000, len(damaged), 997):
        damaged[place] ^= 0x5A
    frames = CODEC.decode(bytes(damaged))
    seen = shown(CODEC.to_file(bytes(damaged)))
    assert seen.shape == frames.shape
    assert np.abs(seen.astype(int) - frames).mean() < 10  # encoded once more
    with pytest.raises(DecodeError):
        CODEC.to_file(b"nothing")


@pytest.mark.parametrize("form", ["WEBP", "GIF", "PNG"])
def test_previews_move(bikes, form):
    frames = CODEC.decode(bikes)
    picture = Image.open(io.BytesIO(animation(frames, 3, form)))
    assert picture.format == form and getattr(picture, "n_frames", 1) == 15
    picture.seek(14)
    difference = np.abs(np.asarray(picture.convert("RGB")).astype(int) - frames[14])
    assert difference.max() == 0 if form != "GIF" else difference.mean() < 12
    assert picture.info["duration"] == pytest.approx(333, abs=5)


def test_ends_of_frames_are_where_they_were_coded(bikes):
    starts = [*picture_starts(bikes), len(bikes)]
    assert len(starts) == 16 and starts[0] == 0
    assert all(len(slices(bikes[start:stop])) == 144 for start, stop in pairwise(starts))
