"""The JPEG codec against Pillow with the paper's arguments, and against the paper's way to cut prompts."""

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from megatron_codec.codecs import Codec, DecodeError, JpegCodec, Report, get_codec
from megatron_codec.errors import UserError
from tests.data_sources import photo_crops

SIZES = [16, 32, 48, 128, 256, 384]
EOI = b"\xff\xd9"


def pillow_stream(picture: Image.Image, quality: int = 25, streamtype: int = 2) -> bytes:
    """The oracle: the call of the paper's public script, on a picture without metadata."""
    buffer = io.BytesIO()
    Image.fromarray(np.asarray(picture)).save(
        buffer, "JPEG", quality=quality, subsampling="4:2:0", streamtype=streamtype, restart_marker_blocks=1
    )
    return buffer.getvalue()


def pixels(picture: Image.Image) -> np.ndarray:
    return np.asarray(picture.convert("RGB"))


@pytest.fixture(scope="module")
def crops() -> list[Image.Image]:
    return photo_crops(60)


@pytest.fixture(scope="module")
def streams(crops) -> list[bytes]:
    return [JpegCodec().encode(crop) for crop in crops]


@pytest.fixture(scope="module")
def small_streams() -> list[bytes]:
    return [JpegCodec(32, remove_head=True).encode(crop) for crop in photo_crops(20, 32)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("quality", [1, 25, 95, 100])
def test_bytes_are_pillows(size, quality):
    codec = JpegCodec(size, quality)
    for crop in photo_crops(12, size):
        stream = codec.encode(crop)
        assert stream == pillow_stream(crop, quality)
        assert codec.to_file(stream) == pillow_stream(crop, quality, streamtype=0)
        assert codec.check(stream) == Report(True)
        oracle = Image.open(io.BytesIO(pillow_stream(crop, quality, streamtype=0)))
        np.testing.assert_array_equal(pixels(codec.decode(stream)), pixels(oracle))


def test_papers_settings_at_256(crops, streams):
    codec = JpegCodec()
    assert codec.tables == pillow_stream(crops[0], streamtype=1)
    assert len(codec.head) == 59
    for crop, stream in zip(crops, streams, strict=True):
        assert stream == pillow_stream(crop)
        spliced = stream[:2] + codec.tables[2:-2] + stream[2:]
        np.testing.assert_array_equal(pixels(codec.decode(stream)), pixels(Image.open(io.BytesIO(spliced))))


@pytest.mark.parametrize("ratio", [0.0, 0.03, 0.1, 0.25, 0.29, 0.5, 0.58, 0.75, 0.97, 1.0])
def test_prompt_is_cut_as_in_the_papers_script(streams, ratio):
    rows = int(32 * ratio)
    for stream in streams:
        parts = stream.split(b"\xff\xd7")
        paper = b"".join(part + b"\xff\xd7" for part in parts[:rows]) if rows < 32 else stream
        prompt = JpegCodec().prompt(stream, ratio)
        assert prompt == (paper if rows else JpegCodec().head)


@pytest.mark.parametrize("remove_head", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_prompt_shows_its_patches_as_in_the_picture(size, remove_head):
    codec = JpegCodec(size, remove_head=remove_head)
    row = size // 16
    for crop in photo_crops(5, size):
        stream = codec.encode(crop)
        picture = pixels(codec.decode(stream))
        for ratio in (0, 0.2, 0.5, 0.8, 1):
            prompt = codec.prompt(stream, ratio)
            patches = codec.prompt_patches(ratio)
            assert stream.startswith(prompt)
            assert abs(patches / codec.num_patches - ratio) < 8 / codec.num_patches
            if 0 < patches < codec.num_patches:
                assert prompt[-2] == 0xFF and prompt[-1] == 0xD0 + (patches - 1) % 8
            # Chroma upsampling looks one pixel ahead, into the row of patches below.
            finished = max(0, patches // row * 16 - 1) if patches < codec.num_patches else size
            np.testing.assert_array_equal(pixels(codec.decode(prompt))[:finished], picture[:finished])
    assert codec.prompt(b"" if remove_head else codec.head, 0.5) == (b"" if remove_head else codec.head)


@pytest.mark.parametrize("ratio", [-0.1, 1.1, float("nan")])
def test_prompt_refuses_a_ratio_outside_0_and_1(ratio):
    with pytest.raises(UserError, match="between 0 and 1"):
        JpegCodec().prompt(JpegCodec().head, ratio)


def test_removed_head_is_spliced_in_again(crops, streams):
    whole, short = JpegCodec(), JpegCodec(remove_head=True)
    for crop, stream in zip(crops[:10], streams, strict=False):
        payload = short.encode(crop)
        assert whole.head + payload == stream
        assert short.to_file(payload) == whole.to_file(stream)
        assert short.prompt(payload, 0.5) == whole.prompt(stream, 0.5)[len(whole.head) :]
        assert short.check(payload).valid


@pytest.mark.parametrize("remove_head", [False, True])
def test_every_truncation_decodes(remove_head):
    codec = JpegCodec(32, remove_head=remove_head)
    for crop in photo_crops(3, 32):
        stream = codec.encode(crop)
        for length in range(len(stream)):
            truncated = stream[:length]
            assert codec.decode(truncated).size == (32, 32)
            report = codec.check(truncated)
            assert not report.valid and report.offset is not None and report.offset <= length


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_every_damaged_stream_decodes(small_streams, data):
    codec = JpegCodec(32, remove_head=True)
    stream = bytearray(data.draw(st.sampled_from(small_streams)))
    for _ in range(data.draw(st.integers(1, 20))):
        place = data.draw(st.integers(0, len(stream) - 1))
        damage = data.draw(
            st.one_of(st.binary(max_size=4), st.sampled_from([b"\xff", b"\xff\xff", b"\xff\xc0", EOI]))
        )
        stream[place : place + data.draw(st.integers(0, 3))] = damage
        stream = stream or bytearray(b"\x00")
    assert codec.decode(bytes(stream)).size == (32, 32)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=300))
def test_any_bytes_decode_without_a_head(stream):
    assert JpegCodec(32, remove_head=True).decode(stream).size == (32, 32)


def test_metadata_has_no_influence():
    crop = photo_crops(1)[0]
    expected = pillow_stream(crop)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    crop.info = {
        "comment": b"made by hand", "icc_profile": b"profile" * 50, "exif": exif.tobytes(), "dpi": (72, 72),
        "xmp": b"<x:xmpmeta/>", "jfif_density": (300, 300), "photoshop": {}, "progressive": 1, "quality": 90,
        "adobe": 100, "gamma": 0.45, "extra": b"bytes", "timestamp": 3,
    }  # fmt: skip
    before = dict(crop.info)
    assert JpegCodec().encode(crop) == expected
    assert JpegCodec().encode(crop.resize((256, 256))) == expected
    assert crop.info == before
    for form in ("PNG", "TIFF", "WEBP"):
        buffer = io.BytesIO()
        options = {"lossless": True} if form == "WEBP" else {}
        crop.save(buffer, form, **options, exif=exif, icc_profile=b"profile" * 50)
        assert JpegCodec().encode(Image.open(buffer)) == expected


def test_check_names_the_first_fault():
    codec = JpegCodec(64)
    stream = codec.encode(photo_crops(1, 64)[0])
    first = stream.index(b"\xff\xd0", 59)
    fifth = stream.index(b"\xff\xd4")
    third = stream.index(b"\xff\xd2")
    cases = {
        "head": (b"\xff\xd9" + stream[2:], 1),
        "D1 is not part of RST0, which is due after MCU 0": (
            stream[:first] + b"\xff\xd1" + stream[first + 2 :],
            first + 1,
        ),
        "D3 is not part of RST2": (stream[:third] + stream[stream.index(b"\xff\xd3") :], third + 1),
        "followed by D1 and not by 00; MCU 1 of 16, block 0": (
            stream[: first + 2] + b"\xff\xd1" + stream[first + 2 :],
            first + 3,
        ),
        "D9 is not part of RST4": (stream[:fifth] + EOI, fifth + 1),
        "ends before EOI": (stream[:-2], len(stream) - 2),
        "ends before EOI ": (stream[:-1], len(stream) - 1),
        "ends in MCU 3 of 16": (stream[: stream.index(b"\xff\xd2") + 4], stream.index(b"\xff\xd2") + 4),
        "3 bytes follow the end": (stream + b"abc", len(stream)),
        "followed by C4": (stream[: first + 4] + b"\xff\xc4" + stream[first + 4 :], first + 5),
    }
    assert codec.check(stream).valid
    for reason, (broken, offset) in cases.items():
        report = codec.check(broken)
        assert not report.valid and reason.strip() in report.reason, (reason, report)
        assert report.offset == offset, (reason, report)


@pytest.mark.parametrize("stream", [b"not a jpeg stream at all" * 5, JpegCodec(32).head, EOI])
def test_decode_refuses_a_stream_of_another_codec(stream):
    with pytest.raises(DecodeError, match="must begin with the head of JpegCodec"):
        JpegCodec().decode(stream)


def test_arrays_are_pictures_too():
    crop = photo_crops(1)[0]
    assert JpegCodec().encode(np.asarray(crop)) == pillow_stream(crop)
    grey = crop.convert("L")
    assert JpegCodec().encode(np.asarray(grey)) == pillow_stream(grey.convert("RGB"))


def test_settings_round_trip_through_json():
    codec = JpegCodec(64, 50, True)
    assert isinstance(codec, Codec)
    assert codec.to_dict() == {
        "name": "jpeg",
        "settings": {"image_size": 64, "quality": 50, "remove_head": True},
    }
    assert get_codec(**json.loads(json.dumps(codec.to_dict()))) == codec
    assert get_codec("jpeg") == JpegCodec(image_size=256, quality=25, remove_head=False)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("gif", {}, "must be one of .*jpeg"),
        ("jpeg", {"size": 256}, "setting size .* must be one of image_size, quality, remove_head"),
        ("jpeg", {"image_size": 250}, "multiple of 16.*use 256"),
        ("jpeg", {"image_size": 0}, "multiple of 16.*use 16"),
        ("jpeg", {"image_size": 65536}, "below 65536; use 65520"),
        ("jpeg", {"quality": 101}, "between 1 and 100"),
        ("jpeg", {"image_size": 7, "quality": 0}, "(?s)image size 7.*quality 0"),
    ],
)
def test_bad_settings_are_named(name, settings, message):
    with pytest.raises(UserError, match=message):
        get_codec(name, settings)


def test_a_package_brings_a_codec_through_an_entry_point(tmp_path, monkeypatch):
    (tmp_path / "negative.py").write_text(
        "from dataclasses import dataclass\n"
        "from PIL import ImageOps\n"
        "from megatron_codec.codecs import JpegCodec\n"
        "@dataclass(frozen=True)\n"
        "class NegativeCodec(JpegCodec):\n"
        "    name = 'negative'\n"
        "    def encode(self, media): return super().encode(ImageOps.invert(media))\n"
    )
    information = tmp_path / "negative-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: negative\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text(
        "[megatron_codec.codecs]\nnegative = negative:NegativeCodec\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    codec = get_codec("negative", {"image_size": 32})
    crop = photo_crops(1, 32)[0]
    assert codec.to_dict()["name"] == "negative"
    assert codec.encode(crop) != JpegCodec(32).encode(crop)
    assert codec.decode(codec.encode(crop)).size == (32, 32)


def test_codecs_need_no_torch():
    code = "import sys, megatron_codec.codecs; print(sorted({'torch', 'megatron'} & set(sys.modules)))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
