"""An evaluation from end to end: references, folders, a checkpoint of ours; going on; bad input."""

import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.codecs.images import Geometry
from megatron_codec.config import TrainingConfig
from megatron_codec.data import CodecDataset
from megatron_codec.errors import UserError
from megatron_codec.evaluation.completers import FolderCompleter, ReferenceCompleter
from megatron_codec.evaluation.engine_completer import Checkpoint, EngineCompleter, held_out
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.evaluate_config import EvaluateConfig
from megatron_codec.evaluation.measure import over_seeds, stream_numbers
from megatron_codec.evaluation.originals import Originals, given_pixels, read_originals
from megatron_codec.evaluation.samples import Sample
from megatron_codec.evaluation.sets import Sets
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.model import build_model, transformer_config
from megatron_codec.preprocessing import PictureEncoder, Selection, iterate_streams
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.training.checkpoint import load_weights
from tests.data_sources import photo_crops
from tests.tiny import CODEC

EACH = range(20)


class Blocks:
    """Mean colours of blocks of 8 pixels: features that take no time."""

    def __init__(self, dimensions=48):
        self.name, self.dimensions, self.seen = "mean colours", dimensions, 0
        self.identity = {"name": self.name}

    def __call__(self, pictures):
        self.seen += len(pictures)
        n, side = pictures.shape[:2]
        return pictures.reshape(n, side // 8, 8, side // 8, 8, 3).mean(axis=(2, 4)).reshape(n, -1)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """60 photographs of 40 pixels, in a folder."""
    folder = tmp_path_factory.mktemp("photos")
    for number, crop in enumerate(photo_crops(60, 40)):
        crop.save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def originals(photos):
    return read_originals(Selection((photos,), limit=20), 32, Geometry(), 48)


def config(photos, output, **changes):
    given = {"image_size": 32, "ratios": (0.25, 0.5), "num_samples": 60, "seeds": 2} | changes
    return EvaluateConfig(data=(photos,), output=output, **given)


def means(results, name="frechet"):
    """{ratio: {completer: mean}}"""
    found = {}
    for row in results["rows"]:
        found.setdefault(row["ratio"], {})[row["completer"]] = row["numbers"][name]["mean"]
    return found


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
    assert results["warnings"] == []


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
    # 8 rows of originals, prompts and 5 sets.
    sheet = np.asarray(Image.open(tmp_path / "contact-0.5.png"))
    first = np.asarray(
        Image.open(photos / "00.png").convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
    )
    assert (sheet[14 + 4 + 1 : 14 + 4 + 96 : 3, 5:100:3] == first).all()
    assert sheet.shape[1] == 4 + 7 * 100


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
    assert results["pictures"] == 59 and "30.png" in results["warnings"][0]


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


class Calls:
    """Counts what an engine is asked for, and stops at a call."""

    def __init__(self, monkeypatch, stop_at=None):
        self.loaded, self.generated, self.stop_at = 0, [], stop_at
        load, generate = Engine.load.__func__, Engine.generate

        def counted_load(kind, *arguments):
            self.loaded += 1
            return load(kind, *arguments)

        def counted_generate(engine, prompts, *arguments):
            if len(self.generated) == self.stop_at:
                raise KeyboardInterrupt
            self.generated.append(len(prompts))
            return generate(engine, prompts, *arguments)

        monkeypatch.setattr(Engine, "load", classmethod(counted_load))
        monkeypatch.setattr(Engine, "generate", counted_generate)


def test_a_run_that_was_stopped_goes_on_and_redoes_nothing(corpus, trained, tmp_path, monkeypatch):
    wanted = EvaluateConfig(
        data=(corpus.pictures,),
        output=tmp_path / "out",
        load=(trained.folder,),
        ratios=(0, 0.5),
        num_samples=4,
        seeds=2,
    )
    with monkeypatch.context() as patch:
        calls = Calls(patch, stop_at=3)
        with pytest.raises(KeyboardInterrupt):
            evaluate(wanted, Blocks())
        assert (calls.loaded, len(calls.generated)) == (1, 3)
        assert not (wanted.output / "results.json").exists()
        assert not list(wanted.output.rglob("*.tmp"))
    with monkeypatch.context() as patch:
        calls, extractor = Calls(patch), Blocks()
        results = evaluate(wanted, extractor)
        # The fourth set and the scores of the originals.
        assert (calls.loaded, len(calls.generated)) == (1, 2)
        # Originals once, then the sets: 4 of the model, 2 of the references of which the ratio is no matter,
        # 2 blurred, 4 of noise.
        assert extractor.seen == 4 * (1 + 4 + 2 + 2 + 4)
    with monkeypatch.context() as patch:
        calls, extractor = Calls(patch), Blocks()
        assert evaluate(wanted, extractor) == results
        assert (calls.loaded, calls.generated, extractor.seen) == (0, [], 0)
    with monkeypatch.context() as patch:  # what is new is made, and nothing else
        calls, extractor = Calls(patch), Blocks()
        more = evaluate(replace(wanted, ratios=(0, 0.25, 0.5), references=("original",)), extractor)
        assert (calls.loaded, len(calls.generated), extractor.seen) == (1, 2, 8)
        assert next(row for row in more["rows"] if row["ratio"] == 0) == results["rows"][0]
    with monkeypatch.context() as patch:  # a stopped run gave the pictures of one that was not
        calls = Calls(patch)
        fresh = evaluate(replace(wanted, output=tmp_path / "fresh"), Blocks())
        assert (calls.loaded, len(calls.generated)) == (1, 5)
        assert fresh["rows"] == results["rows"] and fresh["checkpoints"] == results["checkpoints"]
    with monkeypatch.context() as patch:  # another picture among the originals, and everything is another
        pictures = tmp_path / "pictures"
        shutil.copytree(corpus.pictures, pictures)
        first = sorted(pictures.iterdir())[0]
        Image.open(first).rotate(90).save(first)
        calls = Calls(patch)
        evaluate(replace(wanted, data=(pictures,)), Blocks())
        assert len(calls.generated) == 5
    row = results["rows"][0]
    assert row["completer"].startswith("model (") and row["numbers"]["share_valid"]["mean"] == 1
    made = json.loads((wanted.output / row["sets"][0] / "set.json").read_text())
    assert [each["bytes"] for each in made["numbers"]] == [
        len(CODEC.head) + len(file.read_bytes()) - len(CODEC.file_head)
        for file in sorted((wanted.output / row["sets"][0]).glob("*.jpg"))
    ]


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


def finished(folder, originals, ratios=("0.5",), seeds=(), size=32):
    for ratio in ratios:
        for seed in seeds or ("",):
            part = folder / ratio / str(seed)
            part.mkdir(parents=True)
            for number, pixels in enumerate(originals.pictures):
                Image.fromarray(pixels).resize((size, size)).save(part / f"{number:03d}.png")
    return folder


def test_a_folder_of_finished_pictures_is_a_row(photos, originals, tmp_path):
    good = finished(tmp_path / "copied", originals, seeds=(0, 1))
    wanted = config(
        photos, tmp_path / "out", ratios=(0.5,), num_samples=20, pictures=(good,), references=("blurred",)
    )
    results = evaluate(wanted, Blocks())
    assert abs(means(results)[0.5]["copied"]) < 1e-6 < means(results)[0.5]["blurred"]
    assert len(results["rows"][0]["sets"]) == 2
    # One file another, and the set is made anew.
    Image.new("RGB", (32, 32), "red").save(good / "0.5" / "0" / "007.png")
    assert means(evaluate(wanted, Blocks()))[0.5]["copied"] > 1e-3


def test_finished_pictures_that_do_not_fit_are_refused(photos, originals, tmp_path):
    def refused(folder, message, **changes):
        wanted = config(
            photos, tmp_path / "out", ratios=(0.5,), num_samples=20, pictures=(folder,), **changes
        )
        with pytest.raises(UserError, match=message):
            evaluate(wanted, Blocks())

    small = finished(tmp_path / "small", originals, size=16)
    refused(small, r"16x16 pixels: must be 32x32 pixels.*resize")
    refused(finished(tmp_path / "other", originals, ratios=("0.25",)), r"no folder for the ratio 0\.5.*0\.25")
    refused(finished(tmp_path / "seeds", originals, seeds=(0,)), r"no folder for the seed 1")
    few = finished(tmp_path / "few", originals)
    (few / "0.5" / "003.png").unlink()
    refused(few, r"19 pictures: must be as many as the originals, 20")
    broken = finished(tmp_path / "broken", originals)
    (broken / "0.5" / "003.png").write_bytes(b"none")
    refused(broken, r"003\.png: cannot be read")
    with pytest.raises(UserError, match="no such folder"):
        FolderCompleter(tmp_path / "absent")


def test_all_faults_of_a_command_line_are_told_at_once(photos, trained, tmp_path):
    wrong = EvaluateConfig(
        data=(photos,),
        output=tmp_path / "out",
        load=(trained.folder,),
        ratios=(0.1, 0.5, 0.6, 1.5),
        num_samples=3,
        seeds=0,
        top_p=(2.0,),
        image_size=16,
        quality=30,
        upscale="cubic",
        min_crop=0.5,
        pictures=(tmp_path / "absent",),
        inception=tmp_path / "absent.pt",
    )
    with pytest.raises(UserError) as told:
        evaluate(wrong)
    for message in (
        "--seeds 0: must be at least 1",
        "--num-samples 3: must be at least 4",
        "--image-size 16: must not be below the 32 pixels",
        "--quality: has no meaning beside --load",
        "--upscale cubic: must be one of nearest, bicubic, lanczos, or a folder",
        "top_p 2.0",
        "min crop 0.5",
        "absent: there is no such folder",
        "absent.pt: there is no such file",
        "--ratios 0.1: gives not even one patch",
        "--ratios 0.6: gives the same prompts as 0.5",
        "--ratios 1.5: must be at least 0 and below 1",
    ):
        assert message in str(told.value)
    assert not wrong.output.exists()


def test_too_few_pictures_are_told_with_the_rank_problem(photos, tmp_path):
    with pytest.raises(UserError, match=r"--num-samples 80: there are only 60 pictures.*--num-samples 60"):
        evaluate(config(photos, tmp_path, num_samples=80), Blocks())
    extractor = Blocks(dimensions=100)
    with pytest.raises(UserError, match=r"only 60 pictures.*not more than the 100 features.*rank 59"):
        evaluate(config(photos, tmp_path, num_samples=80), extractor)
    with pytest.raises(UserError, match="nothing to evaluate"):
        evaluate(config(photos, tmp_path, references=()), Blocks())
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "a.png").write_bytes(b"none")
    with pytest.raises(UserError, match=r"none of 1 pictures can be read"):
        evaluate(config(tmp_path / "broken", tmp_path / "out"), Blocks())


def test_what_does_not_decode_counts_as_grey_and_is_told(originals, tmp_path):
    good = Sample.of_pixels(originals.pictures[0])
    known = {"bytes": 100, "real_bytes": 300, "valid": True, "decodes": True}
    samples = [
        replace(good, numbers=known),
        Sample(b"\xff\xd8 no more", ".broken", known | {"bytes": 50, "valid": False, "decodes": False}),
    ]
    sets = Sets(tmp_path)
    for number, sample in enumerate(samples):
        assert not sets.has_part("Some Model", "0123", range(number, number + 1))
        sets.write_part("Some Model", "0123", range(number, number + 1), [sample])
        assert sets.has_part("Some Model", "0123", range(number, number + 1))
    sets.finish("Some Model", "0123", {"a": 1})
    assert sets.has("another name", "0123") and not sets.has("Some Model", "0124")
    made = sets.read("another name", "0123")
    pixels = made.pixels(32)
    assert (pixels[0] == originals.pictures[0]).all() and (pixels[1] == 128).all()
    assert made.picture(1) is None
    found = stream_numbers(made)
    assert (found["share_valid"], found["share_decodes"], found["bytes"]) == (0.5, 0.5, 75)
    assert found["bytes_of_real"] == 0.25
    (made.folder / "set.json").write_text("{")
    with pytest.raises(UserError, match=r"set\.json: cannot be read.*remove"):
        sets.read("Some Model", "0123")


def test_mean_and_deviation_are_over_seeds():
    found = over_seeds([{"frechet": 1.0}, {"frechet": 2.0}, {"frechet": 6.0}])
    assert found["frechet"] == {"mean": 3.0, "deviation": pytest.approx(7**0.5), "values": [1.0, 2.0, 6.0]}
