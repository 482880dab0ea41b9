"""/v1/videos before the engine with a small model of small clips."""

import base64
from dataclasses import replace
from io import BytesIO

import av
import numpy as np
import pytest

from megatron_codec.codecs import AvcCodec
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.tokenizer import Tokenizer
from tests.llama import SMALL, small_model
from tests.server.serving import serving
from tests.videos import moving, write_video

CODEC = AvcCodec(frames=6, width=32, height=32)
FRAMES = moving(6, 32, 32)


def make_engine() -> Engine:
    module, layout = small_model()
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    config = replace(SMALL, seq_length=2048)
    return Engine(module, config, tokenizer, CODEC, layout, EngineConfig(cache_tokens=8192))


@pytest.fixture(scope="module")
def alone():
    return make_engine()


@pytest.fixture(scope="module")
def server():
    with serving(EngineLoop(make_engine())) as running:
        yield running


@pytest.fixture(scope="module")
def upload(tmp_path_factory):
    path = tmp_path_factory.mktemp("videos") / "clip.mp4"
    write_video(path, FRAMES, rate=3)
    return path.read_bytes()


def frames_of(file: bytes) -> np.ndarray:
    with av.open(BytesIO(file)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


@pytest.mark.parametrize(("given", "ratio"), [(None, 4 / 6), (2, 2 / 6), (6, 1)])
def test_edits(server, alone, upload, given, ratio):
    stream = CODEC.encode(BytesIO(upload))
    prompt = alone.prompt_ids(stream, ratio)
    expected = alone.generate([prompt], Sampling(seed=3, n=2, max_tokens=60, heal_prompt=True))
    fields = {"seed": "3", "n": "2", "max_tokens": "60"} | (
        {} if given is None else {"prompt_frames": str(given)}
    )
    encoded = {name: int(value) for name, value in fields.items()}
    encoded["video"] = base64.b64encode(upload).decode()
    replies = [
        server.client.post("/v1/videos/edits", files={"video": upload}, data=fields),
        server.client.post("/v1/videos/edits", json=encoded),
    ]
    for reply in replies:
        assert reply.status_code == 200, reply.text
        assert reply.json()["size"] == "32x32" and reply.json()["output_format"] == "mp4"
        assert reply.json()["usage"]["input_tokens"] == len(expected[0].prompt_ids)
        for item, completion in zip(reply.json()["data"], expected, strict=True):
            file = base64.b64decode(item["b64_json"])
            assert item["valid"] == CODEC.check(completion.stream).valid
            assert item["share_made_up"] == CODEC.decode_reported(completion.stream)[1].share
            assert frames_of(file).shape == (6, 32, 32, 3)
            # what was given is as it was, up to what encoding a damaged clip anew changes
            whole = round(6 * ratio)
            difference = np.abs(frames_of(file)[:whole].astype(int) - CODEC.decode(stream)[:whole])
            assert difference.mean() < 8


def test_generations(server):
    body = {"n": 2, "seed": 1, "max_tokens": 50, "stream": True}
    with server.client.stream("POST", "/v1/videos/generations", json=body) as response:
        events = [line for line in response.iter_lines() if line.startswith("event:")]
    assert events == ["event: video_generation.started"] + ["event: video_generation.completed"] * 2


def test_mistakes(server, upload):
    cases = [
        ({"video": "!"}, "video", "base64"),
        ({"video": base64.b64encode(b"no video").decode()}, "video", "cannot be made a clip"),
        ({"video": base64.b64encode(upload[:100]).decode()}, "video", "cannot be made a clip"),
        ({"video": base64.b64encode(upload).decode(), "prompt_frames": 7}, "prompt_frames", "6 frames"),
        ({"video": base64.b64encode(upload).decode(), "prompt_frames": -1}, "prompt_frames", "greater"),
        ({"video": base64.b64encode(upload).decode(), "size": "64x64"}, "size", "32x32"),
        ({}, "video", "required"),
    ]
    for body, param, message in cases:
        response = server.client.post("/v1/videos/edits", json=body)
        error = response.json()["error"]
        assert response.status_code == 400 and error["param"] == param and message in error["message"], error
    reply = server.client.post("/v1/images/generations", json={})
    assert reply.status_code == 404 and "/v1/videos" in reply.json()["error"]["message"]


def test_a_model_of_pictures_makes_no_clips(picture_server):
    for route in ("generations", "edits"):
        reply = picture_server.client.post(f"/v1/videos/{route}", json={})
        assert reply.status_code == 404 and "/v1/images" in reply.json()["error"]["message"]


@pytest.fixture
def picture_server():
    from tests.server.scripted import ScriptedLoop

    with serving(ScriptedLoop()) as running:
        yield running
