"""The report of examples/reproduce_small.sh, from results whose numbers are known."""

import json

import numpy as np
import pytest
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation.reproduction import Stage, answer, write_reproduction

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


def test_the_report_has_the_numbers_and_its_pictures(run, tmp_path):
    output = tmp_path / "docs" / "reproduction.md"
    output.parent.mkdir()
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
    assert "| VQ transformer, top-k 80, top-p 0.9 | 100.0 +- 1.0 | 32.0 +- 2.0 |" in text
    assert "--top-k 40 80 --top-p 0.9 1 --seeds 1 --output" in text
    assert "--data 'x y.gz' --geometry pad --num-samples 20 --ratios 0 0.5 --top-k 40 --top-p 0.9" in text
    for line in text.splitlines():
        if line.startswith("!["):
            assert (output.parent / line.rpartition("(")[2].rstrip(")")).is_file()
    assert text.count("![") == 7
    before = output.read_bytes()
    write_reproduction(run, output)
    assert output.read_bytes() == before


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
