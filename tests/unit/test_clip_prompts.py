"""What tools/generate.py does with clips: their prompts, and the sheet of frames."""

import numpy as np
import pytest

from megatron_codec.codecs import AvcCodec, JpegCodec
from megatron_codec.contact_sheet import film_sheet
from megatron_codec.errors import UserError
from megatron_codec.inference.clips import clip_sheet, made_up, prompt_faults, prompt_ratio, video_streams
from tests.videos import moving, write_video

CODEC = AvcCodec(frames=6, width=64, height=48)
LINE = (240, 140, 20)


def underlined(sheet, rows: int, columns: int, width: int, height: int) -> list[list[bool]]:
    """Which frames of a sheet are marked as generated; sizes are those of a frame on it."""
    pixels = np.asarray(sheet)
    tops = [4 + y * (height + 8) for y in range(rows)]
    lefts = [4 + x * (width + 4) for x in range(columns)]
    return [[tuple(pixels[top + height + 1, left + 5].tolist()) == LINE for left in lefts] for top in tops]


def test_frames_are_side_by_side_and_generated_ones_are_marked():
    clip = moving(6, 64, 48)
    sheet = film_sheet([(clip, 4), (None, 4), (clip, 6)])
    factor, width, height = 2, 128, 96
    assert sheet.size == (4 + 6 * (width + 4), 4 + 3 * (height + 8))
    assert underlined(sheet, 3, 6, width, height) == [
        [False] * 4 + [True] * 2,
        [False] * 6,
        [False] * 6,
    ]
    for number, frame in enumerate(clip):
        left = 4 + number * (width + 4)
        shown = np.asarray(sheet)[4 : 4 + height : factor, left : left + width : factor]
        np.testing.assert_array_equal(shown, frame)


def test_originals_stand_below_their_samples():
    clips = [moving(6, 64, 48), moving(6, 64, 48)[::-1].copy()]
    originals = [(str(i), CODEC.encode(clip)) for i, clip in enumerate(clips)]
    samples = [CODEC.decode(stream) for _, stream in originals for _ in range(2)]
    sheet = clip_sheet(CODEC, originals, [samples[0], None, *samples[2:]], 0.5)
    expected = film_sheet(
        [(samples[0], 3), (None, 3), (samples[0], 6), (samples[2], 3), (samples[3], 3), (samples[2], 6)]
    )
    assert sheet.tobytes() == expected.tobytes()
    assert clip_sheet(CODEC, [], samples[:1], 0.5).tobytes() == film_sheet([(samples[0], 0)]).tobytes()


def test_prompts_are_counted_in_frames(tmp_path):
    assert prompt_ratio(0.25, None, CODEC) == 0.25
    path = write_video(tmp_path / "clip.mp4", moving(30))
    ((name, stream),) = video_streams([path], CODEC)
    assert name == "clip" and stream == CODEC.encode(path)
    for frames in range(1, 7):
        prompt = CODEC.prompt(stream, prompt_ratio(0.5, frames, CODEC))
        assert prompt == CODEC.first_frames(stream, frames)
    with pytest.raises(UserError, match="--prompt-frames 7: a clip of this model has 6 frames"):
        prompt_ratio(0.5, 7, CODEC)
    with pytest.raises(UserError, match="--prompt-frames 3: the model writes jpeg; give --prompt-ratio"):
        prompt_ratio(0.5, 3, JpegCodec(32))
    with pytest.raises(UserError, match=r"clip.mp4: the model writes jpeg; give --prompt-image"):
        video_streams([path], JpegCodec(32))
    assert video_streams([], JpegCodec(32)) == []


def test_what_was_made_up_is_told():
    stream = CODEC.encode(moving(6, 64, 48))
    assert made_up(CODEC, stream) == {"share_made_up": 0.0}
    assert made_up(CODEC, CODEC.first_frames(stream, 3)) == {"share_made_up": 0.5}
    assert made_up(CODEC, b"nothing") == {"share_made_up": 1.0}
    assert made_up(JpegCodec(32), b"") == {}


def test_mistakes_are_told_together(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        write_video(tmp_path / folder / "clip.mp4", moving(2))
    paths = [tmp_path / "a" / "clip.mp4", tmp_path / "b" / "clip.mp4", tmp_path / "none.mp4"]
    told = [str(fault) for fault in prompt_faults(paths, 0)]
    assert len(told) == 3
    assert "none.mp4: there is no such file" in told[0] and "two videos of one name" in told[1]
    assert "--prompt-frames 0: must be at least 1" in told[2]
    assert list(prompt_faults(paths[:1], 3)) == []
