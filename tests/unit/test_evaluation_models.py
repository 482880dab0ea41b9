"""Several models in one evaluation, pictures of another size, parts of sets, distances by class."""

import csv
import json
import weakref
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.codecs import PixelsCodec
from megatron_codec.codecs.images import Geometry
from megatron_codec.codecs.pixels import palette_text
from megatron_codec.data import write_dataset
from megatron_codec.errors import UserError
from megatron_codec.evaluation import evaluate as evaluation
from megatron_codec.evaluation.classes import Classes
from megatron_codec.evaluation.completers import ReferenceCompleter
from megatron_codec.evaluation.distances import frechet, kernel
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.evaluate_config import EvaluateConfig
from megatron_codec.evaluation.originals import Originals, read_originals
from megatron_codec.evaluation.upscaling import Upscaler, random_numbers
from megatron_codec.inference import Engine
from megatron_codec.preprocessing import Selection
from megatron_codec.tokenizer import Tokenizer
from tests.distributed.launch import launch
from tests.tiny import CODEC, FLAGS
from tests.unit.test_evaluation_protocol import Blocks, means

SMALL = 16


@pytest.fixture(scope="module")
def pixels() -> PixelsCodec:
    colours = np.random.default_rng(0).integers(0, 256, (24, 3), dtype=np.uint8)
    return PixelsCodec(SMALL, palette_text(colours))


@pytest.fixture(scope="module")
def pixel_model(corpus, pixels, tmp_path_factory):
    """A hardly trained model of pictures of 16 pixels."""
    folder = tmp_path_factory.mktemp("pixels")
    streams = [pixels.encode(Image.open(path)) for path in sorted(corpus.pictures.iterdir())]
    tokenizer = Tokenizer(pixels.merges, pixels.to_dict())
    ids, offsets = tokenizer.encode_batch(streams, add_special_tokens=True)
    documents = [ids[start:stop] for start, stop in pairwise(offsets.tolist())]
    write_dataset(folder / "train", documents, pixels.to_dict(), tokenizer.to_dict())
    flags = [*FLAGS, "--seq-length", "258", "--train-iters", "2", "--train-data-path", str(folder / "train")]
    flags += ["--eval-iters", "0", "--save", str(folder / "model"), "--save-interval", "2"]
    launch("tests.distributed.jobs:train", 1, command_lines=[flags])
    return folder / "model"


@pytest.fixture(scope="module")
def wanted(corpus, trained, pixel_model, tmp_path_factory):
    return EvaluateConfig(
        data=(corpus.pictures,),
        output=tmp_path_factory.mktemp("evaluated") / "out",
        load=(trained.folder, pixel_model),
        ratios=(0.5,),
        num_samples=8,
        seeds=1,
        upscale="nearest",
    )


@pytest.fixture(scope="module")
def results(wanted):
    return evaluate(wanted, Blocks())


def test_models_of_different_codecs_and_sizes_stand_in_one_table(wanted, results, trained, pixels):
    rows = {row["completer"]: row for row in results["rows"]}
    names = [f"model ({trained.folder.name})", "model (model)", "original"]
    names += ["other real ones", "other real ones, jpeg", "other real ones, pixels"]
    assert list(rows) == [*names, "original, jpeg", "original, pixels", "blurred", "noise"]
    assert [checkpoint["codec"]["name"] for checkpoint in results["checkpoints"]] == ["jpeg", "pixels"]
    originals = read_originals(Selection(wanted.data, limit=8), 32, Geometry(), 48)
    scores = [checkpoint["held_out"] for checkpoint in results["checkpoints"]]
    for codec, score in zip((CODEC, pixels), scores, strict=True):
        assert codec is not pixels or score["longer_than_the_context"] == 0  # it just fits
        count = 8 - score["longer_than_the_context"]
        assert score["pictures"] == count and score["nats_per_token"] > 0
        nats = score["nats_per_token"] * score["tokens"]
        bits = score["bits_per_pixel"] * count * codec.image_size**2
        assert bits == pytest.approx(nats / np.log(2))
    # Their prompts are those of their codecs, at the size of the originals.
    for name, codec in (("original, pixels", pixels), ("model (model)", pixels), ("original, jpeg", CODEC)):
        folder = wanted.output / rows[name]["sets"][0]
        files = json.loads((folder / "set.json").read_text())["files"]
        assert len(files) == 8
        for number, file in enumerate(files):
            made = np.asarray(Image.open(folder / file).convert("RGB"))
            through = codec.decode(originals.streams(codec)[number])
            shown = np.asarray(through.resize((32, 32), Image.Resampling.NEAREST))
            given = 32 if name.startswith("original") else 16
            assert (made[:given] == shown[:given]).all(), (name, number)
        if name.startswith("original"):
            errors = [
                (np.asarray(codec.decode(stream).resize((32, 32), 0), float) - pixels_of) ** 2
                for stream, pixels_of in zip(originals.streams(codec), originals.pictures, strict=True)
            ]
            psnr = 10 * np.log10(255**2 / np.mean(errors))
            assert rows[name]["numbers"]["psnr"]["mean"] == pytest.approx(psnr)
    assert "psnr" not in rows["model (model)"]["numbers"]
    assert rows["model (model)"]["numbers"]["bytes"]["mean"] == pixels.stored_bytes(2 * SMALL**2)
    assert rows["model (model)"]["numbers"]["share_valid"]["mean"] == 1
    text = (wanted.output / "report.md").read_text()
    assert "| model | pixels | 2 |" in text and "codecs.png" in text


def test_a_model_in_company_makes_what_it_makes_alone(wanted, results, tmp_path):
    alone = evaluate(replace(wanted, load=wanted.load[:1], output=tmp_path), Blocks())
    mine = [row for row in results["rows"] if row["completer"] in {r["completer"] for r in alone["rows"]}]
    assert [row["numbers"] for row in alone["rows"]] == [row["numbers"] for row in mine]
    assert alone["checkpoints"] == results["checkpoints"][:1]


@pytest.mark.parametrize("stop_at", [1, 2])
def test_a_set_that_was_stopped_half_way_goes_on_there(wanted, results, tmp_path, monkeypatch, stop_at):
    monkeypatch.setattr(evaluation, "PART", 3)
    config = replace(wanted, load=wanted.load[:1], output=tmp_path / "a", references=("noise",), ratios=(0,))
    generate, asked = Engine.generate, []

    def counted(engine, prompts, *arguments):
        if len(asked) == stop_at:
            raise KeyboardInterrupt
        asked.append(len(prompts))
        return generate(engine, prompts, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", counted)
        with pytest.raises(KeyboardInterrupt):
            evaluate(config, Blocks())
    [partial] = (tmp_path / "a" / "sets").glob("*.partial")
    assert len(list(partial.glob("part-*.json"))) == stop_at
    (partial / "00007.broken").write_bytes(b"of a part that was not finished")
    again, asked[:] = [], []
    with monkeypatch.context() as patch:
        patch.setattr(Engine, "generate", lambda *a: (again.append(len(a[1])), generate(*a))[1])
        stopped = evaluate(config, Blocks())
    assert len(again) == 3 - stop_at + 1  # the parts that are left, and the scores
    whole = evaluate(replace(config, output=tmp_path / "b"), Blocks())
    assert whole["rows"] == stopped["rows"]
    folders = [tmp_path / run / whole["rows"][0]["sets"][0] for run in "ab"]
    for folder in folders:
        assert not list(folder.parent.glob("*.partial"))
        names = json.loads((folder / "set.json").read_text())["files"]
        assert sorted(names) == sorted(p.name for p in folder.iterdir() if p.name != "set.json")
    for name in names:
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_at_half_size_only_the_middle_counts(corpus, tmp_path):
    selection = Selection((corpus.pictures,), limit=8)
    whole = read_originals(selection, 32, Geometry(), 12, half_size=True)
    small = read_originals(selection, 16, Geometry(), 12)
    assert (whole.active(whole.pictures) == small.pictures).all()
    around = whole.pictures.copy()
    around[:, 8:24, 8:24] = 0
    assert not around.any()
    # The same in the middle and something else around it is at distance 0.
    folder = tmp_path / "framed" / "0.5"
    folder.mkdir(parents=True)
    for number, picture in enumerate(whole.pictures):
        framed = np.full_like(picture, 200)
        framed[8:24, 8:24] = picture[8:24, 8:24]
        Image.fromarray(framed).save(folder / f"{number}.png")
    config = EvaluateConfig(
        data=(corpus.pictures,), output=tmp_path / "out", pictures=(tmp_path / "framed",), image_size=32,
        ratios=(0.5,), num_samples=8, references=("blurred",), half_size=True,
    )  # fmt: skip
    found = means(evaluate(config, Blocks(12)))[0.5]
    assert abs(found["framed"]) < 1e-9 < found["blurred"]
    assert "half size" in (tmp_path / "out/report.md").read_text()
    assert means(evaluate(replace(config, half_size=False, pictures=()), Blocks(48)))[0.5]["blurred"] > 0


def write_csv(path, header, rows):
    with open(path, "w", newline="") as stream:
        csv.writer(stream).writerows([header, *rows])
    return path


def test_distances_by_class_and_what_they_have_to_do_with_counts(corpus, tmp_path):
    names = sorted(path.name for path in corpus.pictures.iterdir())
    kinds = {name: "abcd"[number % 4] for number, name in enumerate(names)}
    classes = write_csv(tmp_path / "classes.csv", ("name", "class"), kinds.items())
    counts = {"a": 1, "b": 100, "c": 10, "d": 1000}
    measured = {"frechet": frechet, "kernel": kernel}
    config = EvaluateConfig(
        data=(corpus.pictures,), output=tmp_path / "out", image_size=32, ratios=(0,), num_samples=30, seeds=2,
        references=("blurred", "noise"), classes=str(classes),
        class_counts=write_csv(tmp_path / "counts.csv", ("class", "count"), counts.items()),
    )  # fmt: skip
    results = evaluate(config, Blocks())
    found = results["classes"]
    assert [w for w in results["warnings"] if w.startswith("class 'c' has 7 pictures, not more than the 48")]
    originals = read_originals(Selection((corpus.pictures,), limit=30), 32, Geometry(), 48)
    assert [kinds[name] for name in originals.names].count("a") == found["pictures"]["a"] == 8
    real = Blocks()(originals.pictures)
    gains = {distance: {} for distance in measured}
    for kind in "abcd":
        chosen = [number for number, name in enumerate(originals.names) if kinds[name] == kind]
        of_row = {}
        for name in ("blurred", "noise"):
            completer = ReferenceCompleter(name, CODEC)
            values = {distance: [] for distance in measured}
            for seed in (0, 1) if name == "noise" else (0,):
                samples = completer.complete(originals, range(30), 0, seed, lambda count: None)
                made = Blocks()(np.stack([sample.pixels() for sample in samples]))
                for distance, of in values.items():
                    of.append(measured[distance](real[chosen].astype(float), made[chosen].astype(float)))
            of_row[name] = {distance: np.mean(of) for distance, of in values.items()}
        for distance, gain in gains.items():
            gain[kind] = of_row["noise"][distance] - of_row["blurred"][distance]
        assert len(found["distances"]) == 4
        for row in found["distances"]:
            expected = of_row[row["completer"]][row["distance"]]
            assert row["of_class"][kind] == pytest.approx(expected, rel=1e-5)
    assert [comparison["distance"] for comparison in found["comparisons"]] == ["frechet", "kernel"]
    logs = [np.log10(counts[kind]) for kind in "abcd"]
    for comparison in found["comparisons"]:
        of_class = gains[comparison["distance"]]
        assert comparison["gain"] == pytest.approx(of_class, rel=1e-5)
        correlation = np.corrcoef(logs, list(of_class.values()))[0, 1]
        assert comparison["pearson"][0] == pytest.approx(correlation, rel=1e-4)
    text = (tmp_path / "out/report.md").read_text()
    assert "| a | 8 | 1 |" in text and "classes-0.png" in text and "classes-1.png" in text
    # Without counts there are distances and no correlation.
    plain = evaluate(replace(config, class_counts=None), Blocks())["classes"]
    assert plain["distances"] == found["distances"] and "pearson" not in plain["comparisons"][0]
    assert not list((tmp_path / "out").glob("classes-*.png")), "plots of the report before"


def test_classes_that_do_not_fit_are_refused(tmp_path):
    def refused(message, rows=(("a.png", "x"), ("b.png", "x")), counts=None, header=("name", "class")):
        table = write_csv(tmp_path / "classes.csv", header, rows)
        numbers = counts and write_csv(tmp_path / "counts.csv", ("class", "count"), counts)
        with pytest.raises(UserError, match=message):
            found = Classes.read(str(table), numbers)
            assert found is not None
            found.members(["a.png", "b.png"])

    refused(r"columns name, kind and must have name and class", header=("name", "kind"))
    refused(r"line 3: 'a\.png' stands there twice", (("a.png", "x"), ("a.png", "y")))
    refused(r"has no class for 1 of 2 pictures, first 'b\.png'", (("a.png", "x"),))
    refused(r"class 'y' has 1 of the 2 pictures.*at least 2"[:9], (("a.png", "x"), ("b.png", "y")))
    refused(r"class 'y': has 0 of the 2", (("a.png", "x"), ("b.png", "x"), ("c.png", "y")))
    refused(r"class 'rare': has 0 of the 2 pictures", counts=(("x", 5), ("rare", 2)))
    refused(r"class 'x': has no count", counts=(("y", 5),))
    refused(r"count '0' of class 'x': must be a whole number above 0", counts=(("x", 0),))
    refused("has no rows", ())
    with pytest.raises(UserError, match="needs --classes"):
        Classes.read(None, tmp_path / "counts.csv")
    with pytest.raises(UserError, match=r"absent\.csv: cannot be read"):
        Classes.read(str(tmp_path / "absent.csv"), None)
    folders = Classes.read("folders", None)
    assert folders is not None
    with pytest.raises(UserError, match=r"has no class for 2 of 2.*put each class into a folder of its own"):
        folders.members(["a.png", "b.png"])
    members = folders.members(["cat/1.png", "dog/2.png", "train/cat/3.png", "dog/4.png"])
    assert {kind: numbers.tolist() for kind, numbers in members.items()} == {"cat": [0, 2], "dog": [1, 3]}


def test_filters_are_pillows_and_a_folder_is_a_pipeline_of_diffusers(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8))
    for name, number in (("nearest", 0), ("bicubic", 3), ("lanczos", 1)):
        made = Upscaler(name)(picture, 48, 0)
        assert made.tobytes() == picture.resize((48, 48), number).tobytes()
    with pytest.raises(UserError, match="folder with a model_index"):
        Upscaler(str(tmp_path))
    folder = tmp_path / "super"
    tiny_super_resolution().save_pretrained(folder)
    upscaler = Upscaler(str(folder), steps=2)
    for size, larger in ((128, (128, 128)), (144, (512, 512))):
        first, again = (Upscaler(str(folder), steps=2)(picture, size, 7) for _ in range(2))
        assert first.size == (size, size) and first.tobytes() == again.tobytes()
        # By hand: from 16 to the 32 that it takes, once to 128 pixels, twice to 512, the rest by the filter.
        by_hand, pipeline = picture.resize((32, 32), Image.Resampling.BICUBIC), tiny_super_resolution()
        noise = random_numbers(7)
        while by_hand.width < size:
            by_hand = pipeline(by_hand, num_inference_steps=2, generator=noise).images[0]
        assert by_hand.size == larger
        by_hand = by_hand.resize((size, size), Image.Resampling.BICUBIC)
        # The same weights elsewhere in memory may give another last bit, and that another level.
        assert np.abs(np.asarray(first, np.int16) - np.asarray(by_hand, np.int16)).max() <= 1
    mine, *others = (np.asarray(upscaler(picture, 128, seed), np.int16) for seed in (7, 8, (1 << 32) + 7))
    for other in others:
        assert (np.abs(mine - other) > 1).mean() > 0.1
    assert set(upscaler.identity) == {"upscale_sha256", "steps", "noise"}
    loaded = weakref.ref(upscaler._pipeline.unet)
    upscaler.release()
    assert loaded() is None
    (folder / "unet" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"--upscale .*holds no LDMSuperResolutionPipeline"):
        Upscaler(str(folder))(picture, 64, 0)


def test_seeds_and_pictures_have_noise_of_their_own_and_the_upscaler_is_released(
    wanted, pixel_model, tmp_path, monkeypatch
):
    (tmp_path / "model_index.json").write_text("{}")
    seen, upscalers = [], []

    def record(upscaler, picture, image_size, seed):
        assert len(upscalers) == 0 or upscalers[-1] is upscaler
        upscalers.append(upscaler)
        vars(upscaler)["_pipeline"] = "loaded"
        seen.append(seed)
        return picture.resize((image_size, image_size))

    monkeypatch.setattr(Upscaler, "__call__", record)
    config = replace(
        wanted, load=(pixel_model,), references=("codec",), upscale=str(tmp_path), output=tmp_path / "out",
        image_size=32, seeds=2, num_samples=4,
    )  # fmt: skip
    model, codec = evaluate(config, Blocks())["rows"]
    assert (model["completer"], codec["completer"]) == ("model (model)", "original, pixels")
    assert len(model["sets"]) == len(codec["sets"]) == 2
    each = [(seed << 32) + number for seed in range(2) for number in range(4)]
    assert sorted(seen) == sorted(2 * each)
    assert "_pipeline" not in vars(upscalers[-1])


def tiny_super_resolution():
    """The pipeline's parts at their smallest, with random weights."""
    from diffusers import DDIMScheduler, LDMSuperResolutionPipeline, UNet2DModel, VQModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        in_channels=6, out_channels=3, block_out_channels=(32, 64), layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip
    blocks = {
        "down_block_types": ("DownEncoderBlock2D",) * 3, "up_block_types": ("UpDecoderBlock2D",) * 3,
        "block_out_channels": (32, 32, 32), "latent_channels": 3,
    }  # fmt: skip
    pipeline = LDMSuperResolutionPipeline(VQModel(**blocks), unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def test_originals_are_compared_at_equal_sizes():
    originals = Originals(("a", "b"), np.zeros((2, 32, 32, 3), np.uint8))
    assert (originals.given(CODEC, 0.25) == np.kron([[1, 0], [0, 0]], np.ones((16, 16), bool))).all()
