"""tools/evaluate.py before a running server: its pictures, its numbers, what is refused."""

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from megatron_codec.codecs.images import Geometry
from megatron_codec.errors import UserError
from megatron_codec.evaluation.engine_completer import Checkpoint
from megatron_codec.evaluation.evaluate import evaluate
from megatron_codec.evaluation.evaluate_config import EvaluateConfig
from megatron_codec.evaluation.originals import read_originals
from megatron_codec.evaluation.server_completer import RunningServer, ServerCompleter
from megatron_codec.evaluation.sets import key_of
from megatron_codec.evaluation.upscaling import Upscaler
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.preprocessing import Selection
from tests.server.scripted import ScriptedLoop
from tests.server.serving import serving
from tests.server.test_videos import make_engine
from tests.unit.test_evaluation_protocol import Blocks

KEY = "secret"


@pytest.fixture(scope="module")
def server(trained):
    loop = EngineLoop(Engine.load(trained.folder, EngineConfig(dtype="float32")))
    with serving(loop, load=trained.folder, api_key=KEY) as running:
        yield running


@pytest.fixture
def wanted(server, corpus, monkeypatch, tmp_path):
    monkeypatch.setenv("MEGATRON_CODEC_API_KEY", KEY)
    return EvaluateConfig(
        data=(corpus.pictures,), output=tmp_path / "out", server=(server.url,), ratios=(0, 0.5),
        num_samples=6, seeds=2, temperature=0.9, references=("original", "codec"),
    )  # fmt: skip


def test_a_server_makes_what_the_engine_makes(wanted, trained, monkeypatch):
    results = evaluate(wanted, Blocks())
    rows = {(row["completer"], row["ratio"]): row for row in results["rows"]}
    name = f"server ({trained.folder.name}), temperature 0.9"
    assert [row for row, _ in rows] == [name, "original", "original, jpeg"] * 2
    engine = Engine.load(trained.folder, EngineConfig(dtype="float32"))
    codec = engine.codec
    originals = read_originals(Selection(wanted.data, limit=6), codec.image_size, Geometry(), 48)
    for ratio in wanted.ratios:
        assert len(rows[name, ratio]["sets"]) == 2
        for seed, folder in enumerate(rows[name, ratio]["sets"]):
            described = json.loads((wanted.output / folder / "set.json").read_text())
            assert len(described["files"]) == 6
            for number, stream in enumerate(originals.streams(codec)):
                sampling = Sampling(temperature=0.9, seed=(seed << 32) + number, heal_prompt=True)
                prompt = engine.prompt_ids(stream, ratio) if ratio else engine.prompt_ids()
                [made] = engine.generate([prompt], sampling)
                file = wanted.output / folder / described["files"][number]
                assert file.read_bytes() == codec.to_file(made.stream), (ratio, seed, number)
        numbers = rows[name, ratio]["numbers"]
        assert numbers["share_valid"]["mean"] == 1 and numbers["bytes"]["mean"] > 100
    # It is not asked again for what there is, and is for another model.
    asked = []
    monkeypatch.setattr(RunningServer, "ask", counting(RunningServer.ask, asked))
    assert evaluate(wanted, Blocks())["rows"] == results["rows"]
    assert asked == ["/v1/models"]
    evaluate(replace(wanted, ratios=(0.25,), seeds=1), Blocks())
    assert asked.count("/v1/images/edits") == 6 and "/v1/images/generations" not in asked


def counting(ask, asked):
    def counted(self, method, path, body=None):
        asked.append(path)
        return ask(self, method, path, body)

    return counted


def test_a_set_is_made_anew_by_a_server_with_other_settings(trained):
    settings = (
        {}, {"weight_dtype": "int8"}, {"dtype": "float32"}, {"canonical": True}, {"in_range": True}
    )  # fmt: skip
    identities = []
    for changed in settings:
        config = EngineConfig(**changed)
        with serving(ScriptedLoop(), engine=config) as running:
            asked = RunningServer(running.url)
        identity = ServerCompleter(asked, Sampling()).identity(0.5, 0)
        # There is no checkpoint, and `created` is when the server started.
        identities.append({**identity, "server_model": identity["server_model"] | {"created": 0}})
        of_engine = Checkpoint(trained.folder, config).identity["engine"]
        assert identity["engine"].items() <= of_engine.items()
        assert len(identity["engine"]) == 4
    assert len({key_of(identity) for identity in identities}) == len(settings)
    # A server of before does not say them.
    for name in identity["engine"]:
        del asked.model[name]
    assert ServerCompleter(asked, Sampling()).identity(0.5, 0)["engine"] == {}


def test_the_noise_of_an_upscaler_is_another_for_each_picture_and_seed(wanted, monkeypatch):
    seen = []

    def record(upscaler, picture, image_size, seed):
        seen.append(seed)
        return picture.resize((image_size, image_size))

    monkeypatch.setattr(Upscaler, "__call__", record)
    evaluate(replace(wanted, image_size=48, ratios=(0.5,), references=()), Blocks())
    assert sorted(seen) == [(seed << 32) + number for seed in range(2) for number in range(6)]


def test_larger_pictures_are_made_from_what_it_writes(wanted):
    config = replace(wanted, image_size=48, upscale="nearest", seeds=1, ratios=(0.5,))
    [row, *_] = evaluate(config, Blocks())["rows"]
    folder = config.output / row["sets"][0]
    for file in json.loads((folder / "set.json").read_text())["files"]:
        assert Image.open(folder / file).size == (48, 48)
        pixels = np.asarray(Image.open(folder / file))
        assert (pixels[0::3] == pixels[1::3]).any()  # 32 to 48: each third row stands twice
    with pytest.raises(UserError, match=r"--image-size 16: must not be below the 32 pixels"):
        evaluate(replace(wanted, image_size=16), Blocks())


def test_what_is_wrong_with_a_server_is_told(wanted, monkeypatch):
    with pytest.raises(UserError, match=r"--server http://127.0.0.1:9: does not answer.*start tools/run"):
        evaluate(replace(wanted, server=("http://127.0.0.1:9",)), Blocks())
    with pytest.raises(UserError, match="--quality: has no meaning beside --load and --server"):
        evaluate(replace(wanted, quality=50), Blocks())
    monkeypatch.delenv("MEGATRON_CODEC_API_KEY")
    with pytest.raises(UserError, match=r"status 401.*set MEGATRON_CODEC_API_KEY"):
        evaluate(wanted, Blocks())
    with (
        serving(EngineLoop(make_engine())) as clips,
        pytest.raises(UserError, match="model of the codec 'avc', and pictures are compared here"),
    ):
        evaluate(replace(wanted, server=(clips.url,)), Blocks())
