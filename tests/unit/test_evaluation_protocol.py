"""An evaluation from end to end: references in their order, completions of a checkpoint of ours, its bits."""

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.given import given_pixels
from megatron_codec.codecs.images import Geometry
from megatron_codec.codecs.pixels import PixelsCodec, palette_text
from megatron_codec.config import TrainingConfig
from megatron_codec.data import CodecDataset
from megatron_codec.evaluation.completers import ReferenceCompleter
from megatron_codec.evaluation.distances import frechet
from megatron_codec.evaluation.engine_completer import Checkpoint, EngineCompleter, held_out
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.originals import Originals, read_originals
from megatron_codec.evaluation.samples import Sample
from megatron_codec.evaluation.upscaling import Upscaler
from megatron_codec.inference import EngineConfig, Sampling
from megatron_codec.model import build_model, transformer_config
from megatron_codec.preprocessing import PictureEncoder, Selection, iterate_streams
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training.checkpoint import load_weights
from tests.evaluating import Blocks, config, means
from tests.tiny import CODEC

EACH = range(20)


def test_the_original_is_at_distance_0_then_comes_blurred_then_noise(photos, tmp_path):
    results = evaluate(config(photos, tmp_path, ratios=(0, 0.25, 0.5, 0.75)), Blocks())
    scale = means(results)[0]["noise"]
    for ratio, of in means(results).items():
        assert abs(of["original"]) < 1e-9 * scale, ratio
        assert 1e-6 * scale < of["original, jpeg"]
        assert 1e-6 * scale < of["blurred"] < 0.5 * of["noise"], ratio
    for name in ("frechet", "kernel"):  # the more is given the nearer
        noise = [of["noise"] for of in means(results, name).values()]
        assert noise == sorted(noise, reverse=True)
    assert means(results, "precision")[0]["original"] == means(results, "recall")[0]["original"] == 1
    assert means(results, "recall")[0]["noise"] == 0
    rows = {row["completer"]: row for row in results["rows"] if row["ratio"] == 0}
    assert len(rows["noise"]["sets"]) == 2 and rows["noise"]["numbers"]["frechet"]["deviation"] > 0
    assert len(rows["blurred"]["sets"]) == 1 and rows["blurred"]["numbers"]["frechet"]["deviation"] is None
    assert rows["original, jpeg"]["numbers"]["share_valid"]["mean"] == 1
    assert rows["original, jpeg"]["numbers"]["bytes_of_real"]["mean"] == 1
    assert "bytes" not in rows["noise"]["numbers"]
    assert len(results["warnings"]) == 1 and "no 60 other real pictures" in results["warnings"][0]
    assert results["originals"] == sorted(path.name for path in photos.iterdir())


def test_other_real_pictures_say_how_near_a_perfect_model_comes(photos, tmp_path):
    """As many again, from between the originals; by themselves and through the codec."""
    results = evaluate(config(photos, tmp_path, ratios=(0, 0.5), num_samples=30), Blocks())
    assert len(results["warnings"]) == 1 and "rank 29" in results["warnings"][0]
    found, every = means(results), read_originals(Selection((photos,), limit=60), 32, Geometry(), 48)
    assert results["originals"] == list(every.names[::2])
    features = Blocks()(every.pictures).astype(float)
    expected = frechet(features[::2], features[1::2])
    for ratio in (0, 0.5):
        assert found[ratio]["other real ones"] == pytest.approx(expected, rel=1e-6)
    coded = [np.asarray(CODEC.decode(stream)) for stream in every.streams(CODEC)[1::2]]
    through = frechet(features[::2], Blocks()(np.stack(coded)).astype(float))
    assert found[0]["other real ones, jpeg"] == pytest.approx(through, rel=1e-6)
    assert found[0]["original, jpeg"] < found[0]["other real ones, jpeg"] < found[0]["noise"]
    # Of 45 of 60 there are only 15 others.
    fewer = evaluate(config(photos, tmp_path, ratios=(0,), num_samples=45), Blocks())
    assert "no 45 other real pictures" in fewer["warnings"][-1]
    assert not any(row["completer"].startswith("other") for row in fewer["rows"])
    alone = read_originals(Selection((photos,), limit=45), 32, Geometry(), 48)
    assert fewer["originals_sha256"] == alone.hash and fewer["originals"] == list(alone.names)


def test_the_report_names_the_features_everywhere_and_stands_alone(photos, tmp_path):
    results = evaluate(config(photos, tmp_path, num_samples=20), Blocks())
    assert json.loads((tmp_path / "results.json").read_text()) == results
    text, page = ((tmp_path / name).read_text() for name in ("report.md", "report.html"))
    assert text.isascii()
    for head in (line for line in text.splitlines() if "Frechet" in line and line.startswith("|")):
        assert head.count("(mean colours") == 4 and "FID" not in head and "KID" not in head
    # 20 pictures for 48 features.
    assert "rank 19" in results["warnings"][0] and "rank 19" in text and "rank 19" in page
    assert "+-" in text and "| noise |" in text
    pictures = set(re.findall(r"\]\((.*?)\)", text))
    assert pictures == {"contact-0.25.png", "contact-0.5.png", "distance.png", "codecs.png"}
    assert all(Image.open(tmp_path / name).size[0] > 100 for name in pictures)
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page)
    # 8 rows of originals, prompts and 7 sets, below the headings.
    sheet = np.asarray(Image.open(tmp_path / "contact-0.5.png"))
    first = np.asarray(
        Image.open(photos / "00.png").convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    )
    top = sheet.shape[0] - 8 * 100
    assert (sheet[top + 1 : top + 96 : 3, 5:100:3] == first).all()
    assert sheet.shape[1] == 4 + 9 * 100


def test_pictures_are_those_that_preprocessing_reads(photos, tmp_path):
    folder = tmp_path / "photos"
    shutil.copytree(photos, folder)
    (folder / "30.png").write_bytes(b"no picture")
    geometry = Geometry("random-crop", "lanczos", seed=3, min_crop=0.5)
    selection = Selection((folder,), "test", 0.5, 15)
    found = read_originals(selection, 32, geometry, 48)
    encoder = PictureEncoder(CODEC, geometry)
    assert found.streams(CODEC) == list(iterate_streams([folder], encoder, "test", 0.5, 15, progress=False))
    whole = read_originals(Selection((folder,), limit=60), 32, geometry, 48)
    assert len(whole) == 59 and [skipped.kind for skipped in whole.skipped] == ["not a picture"]
    results = evaluate(config(folder, tmp_path / "out", references=("original",)), Blocks())
    assert results["pictures"] == 59 and "30.png" in results["warnings"][-1]


def test_what_is_stored_of_codes_are_their_bits_and_a_jpeg_file_has_its_tables(originals):
    palette = palette_text(np.arange(24, dtype=np.uint8).reshape(8, 3))
    codes = PixelsCodec(image_size=32, palette=palette)
    stream = codes.encode(originals.pictures[0])
    made = Sample.of_stream(codes, stream, stream, 32, Upscaler(), 0).numbers
    assert len(stream) == 2048 and made["bytes"] == 1024 * 3 / 8 and "file_bytes" not in made
    stream = CODEC.encode(originals.pictures[0])
    made = Sample.of_stream(CODEC, stream, stream, 32, Upscaler(), 0)
    assert made.numbers["bytes"] == len(stream) and made.numbers["file_bytes"] == len(made.content)


@pytest.mark.parametrize("ratio", [0, 0.25, 0.5, 0.75])
def test_given_are_the_pixels_of_the_prompt(ratio):
    patches = np.arange(4).reshape(2, 2) < 4 * ratio
    assert (given_pixels(CODEC, ratio) == np.kron(patches, np.ones((16, 16), bool))).all()
    # At 256 pixels cuts come after eight patches, half a row.
    assert given_pixels(JpegCodec(256), ratio).mean() == ratio


def test_references_keep_what_is_given(originals):
    given = given_pixels(CODEC, 0.25)
    for kind in ("noise", "blurred"):
        samples = ReferenceCompleter(kind, CODEC).complete(originals, EACH, 0.25, 0, lambda count: None)
        for sample, pixels in zip(samples, originals.pictures, strict=True):
            made = sample.pixels()
            assert (made[given] == pixels[given]).all() and (made[~given] != pixels[~given]).any()
    noise = ReferenceCompleter("noise", CODEC)
    first, again, other = (
        [s.pixels() for s in noise.complete(originals, EACH, 0, seed, lambda count: None)]
        for seed in (0, 0, 1)
    )
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert not np.array_equal(first[0], first[1])


@pytest.fixture(scope="module")
def checkpoint(trained):
    return Checkpoint(trained.folder, EngineConfig())


def test_completions_begin_with_their_prompt_and_differ_where_prompts_are_equal(originals, checkpoint):
    twice = Originals(("a", "b", "c"), originals.pictures[[0, 0, 1]])
    completer = EngineCompleter(checkpoint, Sampling(top_k=40, constrain=True))
    for ratio in (0, 0.5):
        done = []
        samples = completer.complete(twice, range(3), ratio, 5, done.append)
        assert sum(done) == 3
        for sample, stream in zip(samples, twice.streams(CODEC), strict=True):
            prompt = CODEC.to_file(CODEC.prompt(stream, ratio))[: -len(b"\xff\xd9")]
            assert sample.content.startswith(prompt) and sample.numbers["valid"]
        assert samples[0].content != samples[1].content
        assert [s.content for s in completer.complete(twice, range(3), ratio, 5, done.append)] == [
            s.content for s in samples
        ]
        assert completer.complete(twice, range(3), ratio, 6, done.append)[0].content != samples[0].content


def test_a_prompt_that_does_not_fit_is_all_that_there_is_of_its_picture(originals, checkpoint):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    mixed = Originals(("a", "b", "c"), np.stack([originals.pictures[0], noise, originals.pictures[1]]))
    completer, done = EngineCompleter(checkpoint, Sampling(constrain=True)), []
    samples = completer.complete(mixed, range(3), 0.75, 0, done.append)
    assert sum(done) == 3 and ["too_long" in sample.numbers for sample in samples] == [False, True, False]
    start = CODEC.prompt(mixed.streams(CODEC)[1], 0.75)
    assert samples[1].content == CODEC.to_file(start) and not samples[1].numbers["valid"]
    assert len(checkpoint.engine.prompt_ids(mixed.streams(CODEC)[1], 0.75)) == samples[1].numbers["too_long"]


def test_held_out_bits_are_those_of_the_model_of_training(corpus, checkpoint):
    """Document by document, in one forward pass each."""
    tokenizer, dataset = Tokenizer.load(corpus.tokenizer), CodecDataset.open(corpus.valid)
    documents = [dataset.document(number).tolist() for number in range(dataset.num_documents)]
    documents = [ids for ids in documents if len(ids) < 160]
    assert len(documents) > 15
    streams = [tokenizer.decode(ids[1:-1]) for ids in documents]
    same = Originals(("",) * len(streams), np.stack([np.asarray(CODEC.decode(s)) for s in streams]))
    same.streams(CODEC)[:] = streams  # decoded pictures encode to others
    found = held_out(checkpoint, same, lambda count: None)

    layout = checkpoint.engine.layout
    shape, parallel = checkpoint.description.model, checkpoint.config.parallel
    megatron = transformer_config(shape, parallel, TrainingConfig(), layout)
    model = build_model(megatron, shape, tokenizer.num_tokens, layout)
    load_weights(checkpoint.path, [model])
    nats = exact = 0.0
    for ids in documents:
        with torch.no_grad():
            logits = model(torch.tensor([ids]), torch.arange(len(ids))[None], attention_mask=None)[0, :-1]
        labels = torch.tensor(ids[1:])
        nats += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
        logits[:, [tokenizer.bos, *range(tokenizer.num_tokens, logits.shape[1])]] = -torch.inf
        exact += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    tokens = sum(len(ids) - 1 for ids in documents)
    assert (found["tokens"], found["pictures"]) == (tokens, len(documents))
    assert found["nats_per_token"] == pytest.approx(exact / tokens, rel=1e-5)
    # The loss of training counts the probability of BOS and padding, which never come, as lost.
    assert 0 < nats / tokens - found["nats_per_token"] < 0.1
    assert found["bits_per_byte"] == pytest.approx(exact / math.log(2) / sum(map(len, streams)), rel=1e-5)
    assert found["bits_per_pixel"] == pytest.approx(exact / math.log(2) / (len(streams) * 1024), rel=1e-5)


def test_pictures_longer_than_the_context_are_left_out_of_the_bits(checkpoint):
    noise = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), dtype=np.uint8)
    long = Originals(("a", "b"), noise)
    assert all(len(checkpoint.engine.prompt_ids(stream, 1.0)) > 160 for stream in long.streams(CODEC))
    found = held_out(checkpoint, long, lambda count: None)
    assert (found["pictures"], found["longer_than_the_context"], found["nats_per_token"]) == (0, 2, None)
