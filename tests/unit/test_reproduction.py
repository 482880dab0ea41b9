"""The report of examples/reproduce_small.sh, from results whose numbers are known."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation.reproduction import write_reproduction
from megatron_codec.evaluation.reproduction_results import Stage, answer

ROOT = Path(__file__).resolve().parents[2]
LLAMA = "LAYERS=8 WIDTH=128 HEADS=2 LR=3e-3 ROTARY_BASE=500"
DISTANCES = {  # (mean, deviation) from nothing and at 0.5
    "model (jpeg), top-k 40, top-p 0.9": ((60, 1), (30, 1)),
    "model (vq), top-k 40, top-p 0.9": ((100, 1), (32, 2)),
    "model (pixels), top-k 40, top-p 0.9": ((50, 1), (60, 1)),
    "original, jpeg": ((20, None), (20, None)),
    "noise": ((300, 1), (200, 1)),
}


def results(names, ratios=(0, 0.5)):
    rows = []
    for number, ratio in enumerate(ratios):
        for name, distances in DISTANCES.items():
            if name.startswith("model") and not any(f"({wanted})" in name for wanted in names):
                continue
            mean, deviation = distances[number]
            numbers = {"frechet": {"mean": mean, "deviation": deviation, "values": [mean]}}
            half = {"mean": 0.5, "deviation": None, "values": [0.5]}
            numbers |= dict.fromkeys(("kernel", "precision", "recall"), half)
            if name.startswith("original,"):
                numbers |= {
                    "psnr": {"mean": 28.25, "deviation": None},
                    "bytes": {"mean": 77.0, "deviation": None},
                }
            rows.append({"completer": name, "ratio": ratio, "numbers": numbers, "sets": ["x"]})
    scores = {"nats_per_token": 3.5, "bits_per_pixel": 0.75, "tokens": 1500, "pictures": 10}
    checkpoints = [
        {
            "name": name,
            "iteration": 1000,
            "parameters": 5_120_000,
            "tokens": 1_824_000,
            "flops": 5e13,
            "model": {"num_layers": 6, "hidden_size": 256},
            "held_out": scores,
        }
        for name in names
    ]
    settings = {
        "seeds": 3, "top_k": [40], "top_p": [0.9], "load": ["models/jpeg"], "data": ["x y.gz"],
        "ratios": ratios, "geometry": "pad", "num_samples": 20, "half_size": False, "output": "out",
        "references": ["original", "noise"],
    }  # fmt: skip
    return {
        "names": {"frechet": "Frechet distance (X)"} | {n: n for n in ("kernel", "precision", "recall")},
        "pictures": 20,
        "settings": settings,
        "warnings": ["few pictures"],
        "checkpoints": checkpoints,
        "rows": rows,
    }


@pytest.fixture
def run(tmp_path):
    for name, models in (
        ("compare", ("jpeg", "vq", "pixels")),
        ("scale", ("jpeg",)),
        ("quality", ("jpeg",)),
        ("sampling", ("jpeg", "vq")),
    ):
        folder = tmp_path / "run/evaluations" / name
        folder.mkdir(parents=True)
        found = results(models)
        if name == "sampling":
            wider = [row | {"completer": row["completer"].replace("40", "80")} for row in found["rows"]]
            found["rows"] = [row for row in found["rows"] + wider if row["completer"].startswith("model")]
            found["settings"] |= {"seeds": 1, "top_k": [40, 80], "top_p": [0.9, 1.0]}
        (folder / "results.json").write_text(json.dumps(found))
    pictures = ("codecs.png", "distance.png", "contact-0.png", "contact-0.5.png")
    for number, picture in enumerate(pictures):
        pixels = np.full((8, 8, 3), number, np.uint8)
        Image.fromarray(pixels).save(tmp_path / "run/evaluations/compare" / picture)
    for name in ("jpeg", "vq", "pixels"):
        folder = tmp_path / "run/models" / name
        folder.mkdir(parents=True)
        lines = [{"iteration": 1, "loss": 5.0}, {"iteration": 500, "validation_loss": 4.0}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path / "run"


def test_the_answer_says_what_is_apart_and_what_is_not(run):
    stage = Stage.read(run, "compare")
    assert stage is not None
    assert answer(stage) == [
        "From nothing the distance of JPEG-LM is 40% below that of the VQ transformer and 20% above that of "
        "the pixel model.",
        "At prompt ratio 0.5 the distance of JPEG-LM is not apart from that of the VQ transformer and 50% "
        "below that of the pixel model.",
    ]


def test_one_seed_tells_no_models_apart(run):
    path = run / "evaluations/compare/results.json"
    found = json.loads(path.read_text())
    for row in found["rows"]:
        row["numbers"]["frechet"]["deviation"] = None
    path.write_text(json.dumps(found))
    stage = Stage.read(run, "compare")
    assert stage is not None
    first, _ = answer(stage)
    assert first.startswith(
        "From nothing the distance of JPEG-LM is 60.0 and that of the VQ transformer 100.0 (one seed, which "
    )
    found["rows"] = [row for row in found["rows"] if row["completer"].startswith("model (jpeg)")]
    path.write_text(json.dumps(found))
    stage = Stage.read(run, "compare")
    assert stage is not None and answer(stage) == [], "nothing to compare with"


def script(run, *stages, **variables):
    command = ["bash", ROOT / "examples/reproduce_small.sh", *stages]
    environment = os.environ | {"RUN": str(run)} | variables
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


def test_the_script_refuses_to_go_on_with_models_of_other_settings(run):
    done = script(run, "compare")
    assert done.returncode == 2 and "has models, and no file 'settings'" in done.stderr
    (run / "settings").write_text(f"DATASET=fashion-mnist {LLAMA} FLOPS=1e13\n")
    done = script(run, "compare", FLOPS="2e13")
    assert done.returncode == 2 and "FLOPS=1e13, not with" in done.stderr and "FLOPS=2e13" in done.stderr
    done = script(run, "compare", FLOPS="1e13", LR="1e-3")
    assert done.returncode == 2 and "another RUN" in done.stderr
    done = script(run, "compare", FLOPS="1e13", DATASET="photos")
    assert done.returncode == 2 and "with DATASET=photos" in done.stderr
    done = script(run, "compare", DATASET="photo")
    assert done.returncode == 2 and "DATASET=photo: is not known" in done.stderr
    (run / "settings").write_text(f"{LLAMA} FLOPS=1e13\n")  # as before there was a second dataset
    done = script(run, "compare", FLOPS="1e13", DATASET="photos")
    assert done.returncode == 2 and "was made with DATASET=fashion-mnist LAYERS=8" in done.stderr
    done = script(run, "campare")
    assert done.returncode == 2 and "campare: is not known" in done.stderr


def test_the_report_has_the_numbers_and_its_pictures(run, tmp_path):
    output = tmp_path / "docs" / "reproduction.md"
    output.parent.mkdir()
    (run / "settings").write_text("FLOPS=1e13 LR=1e-3\n")
    answers = write_reproduction(run, output)
    text = output.read_text()
    assert text.isascii() and all(sentence in text for sentence in answers)
    assert "| JPEG-LM | 60.0 +- 1.0 | 30.0 +- 1.0 |" in text
    assert "| original, jpeg | 20.0 | 20.0 |" in text
    assert "| jpeg | 28.2 | 77 | 20.0 |" in text
    # 1,824,000 tokens of 151 a picture, its BOS included.
    assert "| VQ transformer | 6 x 256 | 5.12M | 1,000 | 1.8M | 12,079 | 5.00e+13 | 3.500 | 0.750 |" in text
    assert "> **Warning:** few pictures" in text
    assert "over JPEG quality" in text and "half size" not in text
    assert text.startswith("# The paper's comparison in small: Fashion-MNIST at 32x32\n")
    assert "| VQ transformer, top-k 80, top-p 0.9 | 100.0 +- 1.0 | 32.0 +- 2.0 |" in text
    assert "--top-k 40 80 --top-p 0.9 1 --seeds 1 --references original noise --output" in text
    assert "Written by `FLOPS=1e13 LR=1e-3 bash examples/reproduce_small.sh`" in text
    assert "--data 'x y.gz' --geometry pad --num-samples 20 --ratios 0 0.5 --top-k 40 --top-p 0.9" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (output.parent / line.rpartition("(")[2].rstrip(")")).is_file()
    assert text.count("![") == 7
    before = output.read_bytes()
    write_reproduction(run, output)
    assert output.read_bytes() == before


def test_photos_are_said_to_be_such_and_another_dataset_is_refused(run, tmp_path):
    (run / "settings").write_text("DATASET=photos FLOPS=1e13\n")
    shutil.copytree(run / "evaluations/compare", run / "evaluations/half-size")
    write_reproduction(run, tmp_path / "a.md")
    text = (tmp_path / "a.md").read_text()
    assert text.startswith("# The paper's comparison in small: photos at 64x64\n")
    assert "from 31 real colour photos" in text and "Fashion" not in text
    assert "pictures of 32x32 in the middle" in text
    (run / "settings").write_text("DATASET=birds\n")
    with pytest.raises(UserError, match="DATASET=birds: must be one of fashion-mnist, photos"):
        write_reproduction(run, tmp_path / "b.md")
    assert not (tmp_path / "b.md").exists()


def test_stages_that_have_ended_are_reported_without_a_comparison(tmp_path, run):
    (run / "evaluations/compare/results.json").unlink()
    assert write_reproduction(run, tmp_path / "x.md") == []
    text = (tmp_path / "x.md").read_text()
    assert "over size and length of training" in text and "over JPEG quality" in text
    assert "The answer" not in text and "> **Warning:** few pictures" in text and text.count("![") == 2


def test_a_run_without_any_stage_is_told_how_to_make_one(tmp_path, run):
    with pytest.raises(UserError, match=r"no stage that has ended; run bash .*reproduce_small\.sh"):
        write_reproduction(tmp_path, tmp_path / "x.md")
    (run / "evaluations/compare/results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json: cannot be read"):
        write_reproduction(run, tmp_path / "x.md")
    assert not (tmp_path / "x.md").exists()


def test_a_large_picture_is_kept_as_jpeg(run, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (500, 500, 3), np.uint8)
    Image.fromarray(pixels).save(run / "evaluations/compare/contact-0.png")
    write_reproduction(run, tmp_path / "docs/found.md")
    text = (tmp_path / "docs/found.md").read_text()
    assert "(images/found-contact-0.jpg)" in text and "(images/found-contact-0.5.png)" in text
    with Image.open(tmp_path / "docs/images/found-contact-0.jpg") as kept:
        assert kept.format == "JPEG" and kept.size == (500, 500)
