"""An evaluation that is stopped, and what it keeps."""

import json
import shutil
from dataclasses import replace

import pytest
from PIL import Image

from megatron_codec.errors import UserError
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.evaluate_config import EvaluateConfig
from megatron_codec.evaluation.measure import over_seeds, stream_numbers
from megatron_codec.evaluation.samples import Sample
from megatron_codec.evaluation.sets import Sets
from megatron_codec.inference import Engine
from tests.evaluating import Blocks
from tests.tiny import CODEC


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
        # Originals once, then the sets: 4 of the model, 4 of the references of which the ratio is no matter,
        # 2 blurred, 4 of noise.
        assert extractor.seen == 4 * (1 + 4 + 4 + 2 + 4)
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
