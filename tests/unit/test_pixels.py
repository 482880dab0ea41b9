"""The codec of the pixel model, from pictures to samples, beside scikit-learn and plain loops."""

import runpy
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import pairwise_distances_argmin

from megatron_codec.codecs import DecodeError, PixelsCodec, codes, get_codec
from megatron_codec.codecs.pixels import nearest, palette_text
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError
from megatron_codec.inference import Engine, Sampling
from megatron_codec.preprocessing import palette
from megatron_codec.preprocessing.palette import cluster, count_colours
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops, write_photo_folder
from tests.forks import run_tool
from tests.llama import NUM_TOKENS, SMALL, small_model

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
PALETTE = np.unique(RNG.integers(0, 256, (300, 3), np.uint8), axis=0)
CODEC = PixelsCodec(16, palette_text(PALETTE))


def tool(name: str, *arguments) -> str:
    done = run_tool(name, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("num_codes", [2, 129, 512, codes.MAX_CODES])
def test_each_code_is_one_token_whatever_comes_beside_it(num_codes):
    tokenizer = Tokenizer(codes.merges(num_codes))
    values = RNG.integers(0, num_codes, 5000)
    stream = codes.to_stream(values)
    assert tokenizer.encode(stream).tolist() == (256 + values).tolist()
    assert codes.from_stream(stream, num_codes).tolist() == values.tolist()
    assert codes.from_stream(stream[:-1], num_codes).tolist() == values[:-1].tolist()


def test_the_nearest_colour_is_that_of_scikit_learn():
    pixels = RNG.integers(0, 256, (9000, 3), np.uint8)
    ours, theirs = nearest(pixels, PALETTE), pairwise_distances_argmin(pixels, PALETTE)
    distance = [((pixels - PALETTE[found].astype(float)) ** 2).sum(axis=1) for found in (ours, theirs)]
    assert (distance[0] == distance[1]).all() and (ours == theirs).mean() > 0.99


def test_pictures_of_the_palette_come_back(tmp_path):
    pixels = PALETTE[RNG.integers(0, len(PALETTE), (16, 16))]
    stream = CODEC.encode(pixels)
    assert (np.asarray(CODEC.decode(stream)) == pixels).all() and CODEC.check(stream).valid
    (tmp_path / "a.png").write_bytes(CODEC.to_file(stream))
    assert (np.asarray(Image.open(tmp_path / "a.png")) == pixels).all()
    half = CODEC.prompt(stream, 0.55)
    assert len(half) == 2 * 16 * 8
    shown = np.asarray(CODEC.decode(half))
    assert (shown[:8] == pixels[:8]).all() and (shown[8:] == 128).all()
    assert get_codec(**CODEC.to_dict()) == CODEC


@pytest.mark.parametrize(
    ("damage", "reason", "offset"),
    [
        (lambda s: s[:-1], "ends after 255 of 256 codes", 510),
        (lambda s: s + s[:2], "goes on behind code 256", 512),
        (lambda s: s[:100] + s[101:], "is no code of", 100),
        (lambda s: s[:6] + b"\xff\x7f" + s[8:], "is no code of", 6),
        (lambda s: b"", "ends after 0 of 256 codes", 0),
    ],
)
def test_what_is_damaged_is_named(damage, reason, offset):
    report = CODEC.check(damage(CODEC.encode(photo_crops(1, 16)[0])))
    assert not report.valid and reason in report.reason and report.offset == offset


def test_bad_settings_are_refused():
    for change, message in (
        ({"image_size": 0}, "image size 0"),
        ({"palette": "?"}, "cannot be read"),
        ({"palette": palette_text(PALETTE[:1])}, "palette of 1 colours"),
    ):
        with pytest.raises(UserError, match=message):
            replace(CODEC, **change)
    with pytest.raises(DecodeError, match="does not begin with a colour"):
        CODEC.decode(b"ab")
    with pytest.raises(UserError, match="prompt ratio 2"):
        CODEC.prompt(b"", 2)
    with pytest.raises(UserError, match="has no token for code 0"):
        CODEC.grammar([bytes([i]) for i in range(256)])


def test_few_colours_are_kept_as_they_are():
    faces = [bytes([7, 7, 7, 9, 9, 9]), bytes([7, 7, 7, 200, 0, 0])]
    colours, counts = count_colours(faces)
    assert colours.tolist() == [[7, 7, 7], [9, 9, 9], [200, 0, 0]] and counts.tolist() == [2, 1, 1]
    assert (cluster(colours, counts, 3) == colours).all()
    assert len(cluster(colours, counts, 2)) == 2
    with pytest.raises(UserError, match="--num-colors 1"):
        cluster(colours, counts, 1)


def test_of_too_many_colours_each_counts_as_often_as_it_comes(monkeypatch):
    """Black is 87% of the dark pixels, and a mean of them is near black."""
    rng = np.random.default_rng(1)
    dark, bright = rng.integers(40, 60, (300, 3)), rng.integers(200, 220, (300, 3))
    colours = np.unique(np.concatenate([[[0, 0, 0]], dark, bright]), axis=0).astype(np.uint8)
    counts = np.where((colours == 0).all(axis=1), 2000, 1)
    assert len(colours) > 500
    monkeypatch.setattr(palette, "MAX_DIFFERENT", 500)
    sampled = cluster(colours, counts, 2, seed=3)
    monkeypatch.setattr(palette, "MAX_DIFFERENT", 10_000)
    assert np.abs(sampled.astype(int) - cluster(colours, counts, 2, seed=3)).max() <= 3
    assert sampled[0].max() < 10 and sampled[1].min() > 200


def test_from_pictures_to_a_dataset(tmp_path, tmp_path_factory, monkeypatch):
    photos = write_photo_folder(tmp_path_factory.mktemp("photos"))
    errors = []
    for number in (8, 64):
        arguments = ["--image-size", 32, "--num-colors", number, "--output", tmp_path / f"{number}.json"]
        told = tool("train_palette", "--input", photos, *arguments)
        assert told.startswith(f"{number} colours for ")
        errors.append(float(told.split("square error ")[1].split()[0]))
    assert errors[1] < errors[0] / 2
    told = tool(
        "preprocess_images", "--input", photos, "--tokenizer", tmp_path / "64.json", "--workers", 2,
        "--output-prefix", tmp_path / "p", "--check",
    )  # fmt: skip
    assert "1026.0 a document" in told
    assert "every document decodes" in tool("verify_dataset", tmp_path / "p", "--decode")
    dataset = CodecDataset.open(tmp_path / "p")
    assert dataset.manifest.codec["name"] == "pixels" and dataset.manifest.documents > 10
    monkeypatch.setattr(sys, "argv", ["preprocess_images.py", "--input", str(photos), "--output-prefix", "q"])
    sys.argv += ["--tokenizer", str(tmp_path / "bytes.json")]
    Tokenizer([]).save(tmp_path / "bytes.json")
    with pytest.raises(UserError, match="was made for no codec"):
        runpy.run_path(str(ROOT / "tools" / "preprocess_images.py"))["main"]()


def test_samples_are_whole_pictures():
    codec = PixelsCodec(8, palette_text(PALETTE[: NUM_TOKENS - 258]))
    tokenizer = Tokenizer(codec.merges, codec.to_dict())
    assert tokenizer.num_tokens == NUM_TOKENS
    module, layout = small_model()
    engine = Engine(module, SMALL, tokenizer, codec, layout)
    prompt = codec.prompt(codec.encode(photo_crops(1, 8)[0]), 0.5)
    prompts = [engine.prompt_ids(), [tokenizer.bos, *tokenizer.encode(prompt).tolist()]]
    for completion in engine.generate(prompts, Sampling(seed=1, n=3)):
        assert completion.finish_reason == "stop" and codec.check(completion.stream).valid
        assert completion.media.size == (8, 8)
    with pytest.raises(UserError, match="byte 2 of its stream: cannot be part"):
        engine.request([tokenizer.bos, 256, 65], Sampling(), print)
