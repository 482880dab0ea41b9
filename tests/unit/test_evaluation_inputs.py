"""What an evaluation is given: pictures that others finished, and command lines that do not hold."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.completers import FolderCompleter
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.evaluate_config import EvaluateConfig, model_names
from megatron_codec.evaluation.originals import check_ratios
from megatron_codec.tokenizer import Tokenizer
from tests.evaluating import Blocks, config, means


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
    assert not (tmp_path / "out").exists(), "all of this before anything is made"
    cut = finished(tmp_path / "cut", originals)
    (cut / "0.5" / "003.png").write_bytes((cut / "0.5" / "003.png").read_bytes()[:200])
    refused(cut, r"003\.png: cannot be read")
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
    for number in range(3):
        shutil.copy(photos / f"{number:02d}.png", tmp_path / "broken")
    message = r"only 3 of 4 pictures can be read, first not .*a\.png: Pillow.*at least 4"
    with pytest.raises(UserError, match=message):
        evaluate(config(tmp_path / "broken", tmp_path / "out", num_samples=4), Blocks())


def test_at_half_size_a_prompt_has_to_give_a_part_of_the_middle():
    def told(*ratios):
        return [str(fault).partition(" (")[0] for fault in check_ratios(JpegCodec(256), ratios, True)]

    assert told(0, 0.375, 0.4375, 0.5) == []
    nothing, everything = told(0.25, 0.5, 0.75)
    what = "of the picture in the middle of the black one"
    assert nothing == f"--ratios 0.25: gives not even one patch {what}"
    assert everything == f"--ratios 0.75: gives all {what}"
    assert check_ratios(JpegCodec(256), (0.25, 0.5, 0.75)) == []


def test_another_program_gets_what_it_needs_to_complete_the_pictures(photos, tmp_path):
    wanted = config(photos, tmp_path, ratios=(0, 0.25, 0.5), num_samples=10, export=True)
    assert evaluate(wanted, Blocks()) == {}
    exported = tmp_path / "export"
    names = list(csv.DictReader((exported / "names.csv").open(newline="")))
    assert [row["name"] for row in names] == [f"{6 * number:02d}.png" for number in range(10)]
    files = sorted(path.name for path in (exported / "originals").iterdir())
    assert files == [f"{row['number']}.png" for row in names]
    assert sorted(path.name for path in (exported / "jpeg").iterdir()) == ["0.25", "0.5"]
    given = np.asarray(Image.open(exported / "jpeg/0.25/given.png").convert("L")) > 0
    assert given.mean() == 0.25 and given[:16, :16].all()
    for file in files:
        prompt = np.asarray(Image.open(exported / "jpeg/0.25/prompts" / file)).astype(int)
        original = np.asarray(Image.open(exported / "originals" / file)).astype(int)
        assert (prompt[~given] == 128).all()
        assert np.abs(prompt[given] - original[given]).mean() < 20
    # A program that copies the originals is at no distance; so they are in the right order.
    shutil.copytree(exported / "originals", tmp_path / "program" / "0.5")
    results = evaluate(
        config(photos, tmp_path / "out", ratios=(0.5,), num_samples=10, pictures=(tmp_path / "program",)),
        Blocks(),
    )
    assert abs(means(results)[0.5]["program"]) < 1e-6
    with pytest.raises(UserError, match=r"export: is there; remove it"):
        evaluate(wanted, Blocks())


def test_codecs_are_compared_without_models_of_them(photos, tmp_path):
    for quality in (10, 90):
        Tokenizer([], JpegCodec(32, quality).to_dict()).save(tmp_path / f"q{quality}.json")
    codecs = (tmp_path / "q10.json", tmp_path / "q90.json")
    wanted = config(photos, tmp_path / "out", ratios=(0.5,), num_samples=20, codecs=codecs)
    found = means(evaluate(wanted, Blocks()))[0.5]
    names = [f"original, jpeg of {path}" for path in codecs]
    assert found[names[1]] < found["original, jpeg of the flags"] < found[names[0]]
    plain = tmp_path / "plain.json"
    Tokenizer([]).save(plain)
    with pytest.raises(UserError, match=r"--codecs .*plain\.json: was made for no codec"):
        evaluate(replace(wanted, codecs=(plain,)), Blocks())


def test_models_in_folders_of_one_name_are_told_apart_by_their_parents():
    folders = [Path(text) for text in ("/a/x/checkpoint", "/b/x/checkpoint", "/c/other")]
    assert model_names(folders) == ["a/x/checkpoint", "b/x/checkpoint", "other"]
    assert model_names([Path("/a/one"), Path("/b/two")]) == ["one", "two"]
    assert model_names([Path("/a/one"), Path("/a/one")]) == ["//a/one", "//a/one"]
