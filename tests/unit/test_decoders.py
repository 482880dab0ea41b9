"""Files of every format decoded, whole and reduced, with Pillow and with DALI."""

import io
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry, canonical
from megatron_codec.errors import UserError
from megatron_codec.preprocessing import PictureEncoder, PillowDecoder, iterate_streams
from megatron_codec.preprocessing.sources import Item, UnusableError
from tests.data_sources import photo_crops, real_photos

CODEC = JpegCodec(64)
needs_dali = pytest.mark.skipif(
    find_spec("nvidia") is None or find_spec("nvidia.dali") is None,
    reason="NVIDIA DALI is not installed: pip install -r requirements/dali.txt",
)


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", **{"quality": 90, **options})
    return file.getvalue()


def decoded(decoder, contents, geometry=None, size=64) -> list:
    items = [Item(str(i), str(i), i, lambda content=content: content) for i, content in enumerate(contents)]
    needed = (geometry or Geometry()).pixels_needed
    return [picture for _, picture in decoder.decode(items, lambda w, h: needed(w, h, size))]


def write_every_format(folder: Path) -> None:
    """One photograph in every format and mode that people have."""
    photo = photo_crops(3, 96)[1]
    grey, other = photo.convert("L"), photo.rotate(90)
    for suffix in ("bmp", "gif", "jp2", "jpg", "pcx", "png", "ppm", "sgi", "tga", "tif", "webp"):
        photo.save(folder / f"rgb.{suffix}")
    for suffix in ("gif", "jpg", "pgm", "png", "tif"):
        grey.save(folder / f"grey.{suffix}")
    photo.convert("CMYK").save(folder / "cmyk.jpg")
    photo.convert("CMYK").save(folder / "cmyk.tif")
    photo.quantize(64).save(folder / "palette.png")
    photo.convert("1").save(folder / "bits.png")
    transparent = photo.copy()
    transparent.putalpha(grey)
    for suffix in ("png", "webp", "tif"):
        transparent.save(folder / f"alpha.{suffix}")
    sixteen = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    sixteen.save(folder / "sixteen.png")
    sixteen.save(folder / "sixteen.tif")
    for suffix in ("gif", "png", "webp"):
        photo.save(folder / f"animation.{suffix}", save_all=True, append_images=[other], duration=50)
    exif = Image.Exif()
    exif[0x0112] = 6
    photo.save(folder / "turned.jpg", exif=exif)
    photo.save(folder / "progressive.jpg", progressive=True)
    photo.save(folder / "named wrongly.png", "JPEG")


def test_every_format_that_pillow_opens(tmp_path):
    write_every_format(tmp_path)
    paths = sorted(tmp_path.iterdir())
    encoder = PictureEncoder(CODEC, decoder=PillowDecoder(scaled_decode=False))
    streams = list(iterate_streams([tmp_path], encoder, progress=False))
    assert streams == [CODEC.encode(Image.open(path)) for path in paths] and len(paths) == 31
    # Those that lose nothing show the same pixels, whatever the format.
    same = [
        streams[paths.index(tmp_path / f"rgb.{suffix}")] for suffix in ("bmp", "pcx", "png", "ppm", "tif")
    ]
    assert len(set(same)) == 1
    assert streams[paths.index(tmp_path / "animation.png")] == same[0]


@pytest.mark.parametrize("size", [16, 64, 128, 256])
@pytest.mark.parametrize("method", ["crop", "pad", "random-crop"])
def test_scaled_decode_is_the_smallest_that_leaves_enough_pixels(size, method):
    """The oracle is libjpeg at each scale, asked through Pillow by hand."""
    geometry = Geometry(method, min_crop=0.7 if method == "random-crop" else 1.0)
    for path in real_photos()[:6]:
        photo = Image.open(path).convert("RGB")
        content = jpeg(photo)
        (found,) = decoded(PillowDecoder(), [content], geometry, size)
        fits = []
        for scale in (1, 2, 4, 8):
            small = Image.open(io.BytesIO(content))
            small.draft(None, (photo.width // scale, photo.height // scale))  # type: ignore
            assert small.size == (-(-photo.width // scale), -(-photo.height // scale))
            least = max(photo.size) if method == "pad" else min(photo.size) * geometry.min_crop
            if least / scale >= size or scale == 1:
                fits.append(small)
        assert found.size == fits[-1].size
        np.testing.assert_array_equal(np.asarray(found), np.asarray(fits[-1]))
        (whole,) = decoded(PillowDecoder(scaled_decode=False), [content], geometry, size)
        assert whole.size == photo.size
        pair = [canonical(image, size, geometry, "name") for image in (found, whole)]
        error = np.asarray(pair[0]).astype(float) - np.asarray(pair[1])
        assert 10 * np.log10(255**2 / max(1e-9, np.mean(error**2))) > 22


def test_scaled_decode_leaves_other_files_and_turned_pictures_right():
    photo = Image.open(real_photos()[1]).convert("RGB").crop((0, 0, 400, 280))
    exif = Image.Exif()
    exif[0x0112] = 8
    turned, upright = jpeg(photo, exif=exif), jpeg(photo)
    pictures = decoded(PillowDecoder(), [turned, upright])
    assert pictures[0].size == pictures[1].size == (100, 70)
    first, second = (canonical(picture, 64) for picture in pictures)
    np.testing.assert_array_equal(np.asarray(first), np.rot90(np.asarray(second)))
    grey = jpeg(photo.convert("L"))
    assert decoded(PillowDecoder(), [grey])[0].mode == "L"
    cmyk = jpeg(photo.convert("CMYK"))
    assert decoded(PillowDecoder(), [cmyk])[0].size == (100, 70)


def test_what_cannot_be_used_is_said():
    photo = photo_crops(1, 64)[0]
    whole = jpeg(photo)
    huge = io.BytesIO()
    Image.new("1", (20_000, 20_000)).save(huge, "PNG")
    large = jpeg(photo.resize((200, 100)))
    contents = [b"", b"text", whole[:-200], large, huge.getvalue(), whole]
    found = decoded(PillowDecoder(max_pixels=19_999), contents)
    kinds = [error.kind if isinstance(error, UnusableError) else type(error).__name__ for error in found]
    assert kinds == [
        *("empty file", "not a picture", "OSError", "too many pixels", "too many pixels"),
        "JpegImageFile",
    ]
    assert str(found[3]) == "200 x 100 pixels are above --max-pixels 19999"
    assert "truncated" in str(found[2])


@needs_dali
def test_dali_gives_the_pixels_of_pillow(tmp_path):
    from megatron_codec.preprocessing.dali import DaliDecoder

    contents = []
    for i, path in enumerate(real_photos()):
        photo = Image.open(path).convert("RGB")
        exif = Image.Exif()
        exif[0x0112] = i % 8 + 1
        contents += [
            jpeg(photo, exif=exif),
            jpeg(photo, progressive=True, subsampling="4:4:4"),
            jpeg(photo.crop((0, 0, 333, 217)), subsampling="4:2:2", quality=60),
            jpeg(photo.convert("L")),
            jpeg(photo.convert("CMYK")),
        ]
    plain, dali = PillowDecoder(scaled_decode=False), DaliDecoder("cpu")
    for one, other in zip(decoded(plain, contents), decoded(dali, contents), strict=True):
        pair = [np.asarray(canonical(picture, 256)) for picture in (one, other)]
        np.testing.assert_array_equal(*pair)
    write_every_format(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(contents[0][:5000])
    (tmp_path / "text.jpg").write_text("text")
    streams = [
        list(iterate_streams([tmp_path], PictureEncoder(CODEC, decoder=decoder), progress=False))
        for decoder in (plain, dali)
    ]
    assert streams[0] == streams[1] and len(streams[0]) == 31
    assert "dali" in dali.versions()


@pytest.mark.skipif(not needs_dali.args[0], reason="NVIDIA DALI is installed")
def test_dali_is_refused_where_it_is_not_installed():
    from megatron_codec.preprocessing.dali import DaliDecoder

    with pytest.raises(UserError, match=r"--decoder dali: .*; pip install 'megatron_codec\[dali\]'"):
        DaliDecoder("cpu")
