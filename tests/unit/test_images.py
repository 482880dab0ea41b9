"""Pictures of every kind made canonical, compared with Pillow's own helpers and with plain arithmetic."""

import io
import re

import numpy as np
import pytest
from PIL import Image, ImageOps

from megatron_codec.codecs.images import Geometry, canonical, to_rgb
from megatron_codec.errors import UserError
from tests.data_sources import photo_crops, real_photos

SIZE = 64


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    return photo_crops(3, SIZE)[1]


def array(image: Image.Image) -> np.ndarray:
    return np.asarray(image).astype(int)


def file_of(image: Image.Image, form: str, **options) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return Image.open(buffer)


def luma(photo: Image.Image) -> np.ndarray:
    return np.asarray(photo.convert("L"))


@pytest.mark.parametrize("path", real_photos(), ids=lambda path: path.stem)
def test_crop_is_the_centred_square(path):
    photo = Image.open(path).convert("RGB")
    for size in (32, 256):
        expected = ImageOps.fit(photo, (size, size), Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(array(canonical(Image.open(path), size)), array(expected))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("form", ["JPEG", "PNG", "TIFF"])
def test_exif_rotation_is_obeyed(orientation, form):
    exif = Image.Exif()
    exif[0x0112] = orientation
    source = file_of(Image.open(real_photos()[1]).crop((0, 0, 300, 200)), form, exif=exif)
    upright = ImageOps.exif_transpose(source)
    np.testing.assert_array_equal(array(to_rgb(source)), array(upright))
    expected = ImageOps.fit(upright, (SIZE, SIZE), Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(array(canonical(source, SIZE)), array(expected))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_lose_the_picture(photo):
    exif = b"Exif\x00\x00MM\x00\x2a\x00\x00\x00\x08\x7f\xff" + b"\x55" * 40
    source = file_of(photo, "PNG", exif=exif)
    np.testing.assert_array_equal(array(canonical(source, SIZE)), array(photo))


@pytest.mark.parametrize("mode", ["RGBA", "RGBa", "LA", "La", "PA"])
def test_alpha_is_laid_over_white(photo, mode):
    alpha = np.tile(np.linspace(0, 255, SIZE).astype(np.uint8), (SIZE, 1))
    colour = photo.convert("L" if mode in ("LA", "La") else "P" if mode == "PA" else "RGB")
    source = colour.convert(mode if mode in ("LA", "PA") else "LA" if mode == "La" else "RGBA")
    source.putalpha(Image.fromarray(alpha))
    source = source.convert(mode)
    share = alpha[..., None] / 255
    expected = array(colour.convert("RGB")) * share + 255 * (1 - share)
    # Premultiplied modes have lost some precision where they are nearly transparent.
    opaque = alpha > (128 if mode in ("RGBa", "La") else -1)
    assert np.abs(array(canonical(source, SIZE)) - expected)[opaque].max() <= 2


def test_transparent_palette_and_colour_key(photo):
    palette = photo.quantize(16)
    palette.info["transparency"] = 3
    index = np.asarray(palette)
    for source in (palette, file_of(palette, "PNG"), file_of(palette, "GIF")):
        result = array(canonical(source, SIZE))
        assert (result[index == 3] == 255).all()
        np.testing.assert_array_equal(result[index != 3], array(palette.convert("RGB"))[index != 3])
    keyed = photo.copy()
    keyed.info["transparency"] = photo.getpixel((5, 5))
    assert canonical(keyed, SIZE).getpixel((5, 5)) == (255, 255, 255)
    assert canonical(file_of(keyed, "PNG"), SIZE).getpixel((5, 5)) == (255, 255, 255)


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV"])
def test_other_modes_as_pillow_converts_them(photo, mode):
    source = photo.convert(mode)
    result = canonical(source, SIZE)
    assert result.mode == "RGB" and result.info == {}
    np.testing.assert_array_equal(array(result), array(source.convert("RGB")))


def test_cmyk_jpeg_is_not_inverted(photo):
    source = file_of(photo.convert("CMYK"), "JPEG", quality=95)
    assert source.mode == "CMYK"
    assert np.abs(array(canonical(source, SIZE)) - array(photo)).mean() < 6


@pytest.mark.parametrize("form", ["PNG", "TIFF", "PPM"])
def test_16_bit_grey_keeps_its_range(photo, form):
    wide = luma(photo).astype(np.uint16) * 257
    source = file_of(Image.fromarray(wide.astype(np.int32) if form == "PPM" else wide), form)
    assert source.mode.startswith("I")
    result = array(canonical(source, SIZE))
    np.testing.assert_array_equal(result, np.repeat(luma(photo)[..., None], 3, axis=2))


def test_16_bit_grey_of_the_other_byte_order(photo):
    wide = (luma(photo).astype(np.uint16) << 8).astype(">u2").tobytes()
    result = array(canonical(Image.frombytes("I;16B", (SIZE, SIZE), wide), SIZE))
    np.testing.assert_array_equal(result[..., 0], luma(photo))


def test_first_frame_of_an_animation():
    frames = photo_crops(3, SIZE)
    for form in ("GIF", "WEBP", "PNG", "TIFF"):
        options = {"lossless": True} if form == "WEBP" else {}
        first = file_of(frames[0], form, **options)
        animation = file_of(frames[0], form, save_all=True, append_images=frames[1:], **options)
        np.testing.assert_array_equal(array(canonical(animation, SIZE)), array(first.convert("RGB")))


@pytest.mark.parametrize("shape", [(28, 28), (28, 20), (64, 64), (200, 100), (1, 300)])
def test_pad_centres_on_black_and_never_enlarges(photo, shape):
    height, width = shape
    source = photo.resize((width, height))
    result = canonical(source, SIZE, Geometry("pad"))
    scale = min(1, SIZE / max(shape))
    inner = (max(1, round(width * scale)), max(1, round(height * scale)))
    left, top = (SIZE - inner[0]) // 2, (SIZE - inner[1]) // 2
    box = (left, top, left + inner[0], top + inner[1])
    expected = source.resize(inner, Image.Resampling.BICUBIC) if scale < 1 else source
    np.testing.assert_array_equal(array(result.crop(box)), array(expected))
    outside = array(result)
    outside[box[1] : box[3], box[0] : box[2]] = 0
    assert outside.sum() == 0


def test_the_source_is_left_alone(photo):
    source = photo.copy()
    source.info["comment"] = b"mine"
    result = canonical(source, SIZE)
    assert result.info == {} and source.info == {"comment": b"mine"}


@pytest.mark.parametrize(
    "picture",
    [
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4), np.float32),
        np.zeros((4, 4, 3), np.uint16),
        np.zeros((0, 4), np.uint8),
        np.zeros(5, np.uint8),
        Image.new("F", (5, 5)),
        Image.new("RGB", (0, 5)),
    ],
    ids=lambda picture: f"{type(picture).__name__} of {getattr(picture, 'shape', None) or picture.size}",
)
def test_what_is_no_picture_is_refused(picture):
    with pytest.raises(UserError):
        canonical(picture, SIZE)


@pytest.mark.parametrize("resample", ["bicubic", "lanczos", "box"])
@pytest.mark.parametrize("method", ["crop", "pad"])
def test_filters_are_those_of_pillow(method, resample):
    photo = Image.open(real_photos()[1]).convert("RGB")
    fit = ImageOps.fit if method == "crop" else ImageOps.pad
    expected = fit(photo, (SIZE, SIZE), Image.Resampling[resample.upper()])
    np.testing.assert_array_equal(array(canonical(photo, SIZE, Geometry(method, resample))), array(expected))


def test_random_crops_are_squares_of_the_picture_decided_by_seed_and_name():
    """A picture whose colour is its place shows which square was cut."""
    width, height = 400, 300
    red, green = np.meshgrid(np.arange(width) / 2, np.arange(height) / 2)
    picture = np.stack([red, green, red * 0], axis=2).round().astype(np.uint8)
    lefts, tops, sides = [], [], []
    for i in range(300):
        geometry = Geometry("random-crop", "box", seed=7, min_crop=0.5)
        crop = array(canonical(picture, SIZE, geometry, f"{i}.jpg"))
        assert (crop == array(canonical(picture, SIZE, geometry, f"{i}.jpg"))).all()
        (left, top), (right, bottom) = crop[0, 0, :2] * 2, crop[-1, -1, :2] * 2
        step = (right - left) / (SIZE - 1)
        sides.append((right - left) + step)
        assert abs(sides[-1] - (bottom - top) - step) < 8
        assert left > -3 and top > -3 and right < width + 3 and bottom < height + 3
        lefts.append(left / (width - sides[-1]))
        tops.append(top / (height - sides[-1]))
    assert 145 < min(sides) < 160 and 290 < max(sides) < 305
    assert abs(np.mean(sides) - 225) < 10  # four standard deviations of the mean
    for places in (lefts[:200], tops[:200]):
        assert abs(np.median(places) - 0.5) < 0.15 and min(places) < 0.1
    whole = {
        bytes(canonical(picture, SIZE, Geometry("random-crop", seed=s), "a").tobytes()) for s in range(9)
    }
    assert len(whole) > 5  # the whole height, at different places
    other = Geometry("random-crop", seed=1)
    assert canonical(picture, SIZE, other, "a") != canonical(picture, SIZE, other, "b")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("stretch",), "geometry 'stretch': must be one of crop, random-crop, pad"),
        (("crop", "nearest"), "resample 'nearest': must be one of bicubic, lanczos, box"),
        (("random-crop", "box", 0, 1.5), "min crop 1.5: must be above 0 and at most 1"),
        (("pad", "box", 0, 0.5), "min crop 0.5: has no meaning for the geometry 'pad'"),
    ],
)
def test_geometries_that_make_no_sense(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        Geometry(*arguments)
