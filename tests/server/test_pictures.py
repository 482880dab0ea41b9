"""Pictures from nothing and from parts of pictures: whole, streamed, painted, stopped."""

import base64
import io
import json
import time

import numpy as np
import pytest
from PIL import Image

from megatron_codec.inference.server.pictures import Painter, Partials, Picture, Pictures
from tests.server.scripted import CODEC, STREAMS, TOKENIZER, ScriptedLoop
from tests.server.serving import serving, until
from tests.server.test_completions import VOCABULARY, expected

HEAD = [TOKENIZER.bos, *TOKENIZER.encode_to_list(CODEC.preamble)]


def pixels(file: bytes) -> np.ndarray:
    picture = Image.open(io.BytesIO(file))
    picture.load()
    return np.asarray(picture)


def file_of(prompt, tokens) -> bytes:
    return CODEC.to_file(VOCABULARY.join([*prompt, *tokens]))


def events_of(response):
    """Names and data of server-sent events, as they come."""
    name = None
    for line in response.iter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("data: "):
            data = json.loads(line.removeprefix("data: "))
            assert data["type"] == name
            yield name, data


def test_generations(server):
    reply = server.client.post("/v1/images/generations", json={"n": 3, "seed": 1, "size": "32x32"}).json()
    assert reply["size"] == "32x32" and reply["output_format"] == "jpeg"
    for index, item in enumerate(reply["data"]):
        tokens, reason = expected(HEAD, index, seed=1)
        assert base64.b64decode(item["b64_json"]) == file_of(HEAD, tokens)
        assert pixels(base64.b64decode(item["b64_json"])).shape == (32, 32, 3)
        assert item["valid"] and item["reason"] == ""
        assert (item["index"], item["seed"], item["finish_reason"]) == (index, 1, reason)
        assert item["new_tokens"] == len(tokens)
        assert item["redrawn"] == len(tokens) // 2 and item["removed"] == 0.25
    assert reply["usage"]["input_tokens"] == len(HEAD)
    assert reply["usage"]["output_tokens"] == sum(item["new_tokens"] for item in reply["data"])
    # without a seed the answer names the one that was drawn, and it repeats the pictures
    first = server.client.post("/v1/images/generations", json={}).json()["data"][0]
    again = server.client.post("/v1/images/generations", json={"seed": first["seed"]}).json()["data"][0]
    assert again["b64_json"] == first["b64_json"]


def test_a_picture_that_is_cut_short_says_so(server):
    body = {"seed": 1, "max_tokens": 5}
    [item] = server.client.post("/v1/images/generations", json=body).json()["data"]
    assert not item["valid"] and item["reason"] and item["finish_reason"] == "length"
    assert pixels(base64.b64decode(item["b64_json"])).shape == (32, 32, 3)


@pytest.mark.parametrize("how", ["multipart", "json", "data URL", "openai's list"])
@pytest.mark.parametrize("ratio", [0, 0.5, 0.75, 1])
def test_edits(server, how, ratio):
    original = CODEC.decode(STREAMS[2])
    buffer = io.BytesIO()
    original.save(buffer, "PNG")
    fields = {"prompt_ratio": ratio, "seed": 4, "n": 2}
    if how == "multipart" or how == "openai's list":
        name = "image" if how == "multipart" else "image[]"
        response = server.client.post("/v1/images/edits", files={name: buffer.getvalue()}, data=fields)
    else:
        encoded = base64.b64encode(buffer.getvalue()).decode()
        prefix = "data:image/png;base64," if how == "data URL" else ""
        response = server.client.post("/v1/images/edits", json=fields | {"image": prefix + encoded})
    assert response.status_code == 200, response.text
    prompt = [TOKENIZER.bos, *TOKENIZER.encode_to_list(CODEC.prompt(CODEC.encode(original), ratio))]
    for index, item in enumerate(response.json()["data"]):
        tokens, _ = expected(prompt, index, seed=4)
        assert base64.b64decode(item["b64_json"]) == file_of(prompt, tokens)


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "I;16", "1"])
def test_edits_of_every_mode_and_size(server, mode):
    picture = Image.new(mode, (90, 40))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG" if mode == "CMYK" else "PNG")
    response = server.client.post("/v1/images/edits", files={"image": buffer.getvalue()}, data={"n": "1"})
    assert response.status_code == 200, response.text


@pytest.mark.parametrize("route", ["generations", "edits"])
def test_streamed(slow_server, route):
    body = {"n": 2, "seed": 2, "stream": True, "partial_images": 3}
    kind = "image_generation" if route == "generations" else "image_edit"
    if route == "edits":
        body |= {"image": base64.b64encode(CODEC.to_file(STREAMS[0])).decode(), "prompt_ratio": 0}
    with slow_server.client.stream("POST", f"/v1/images/{route}", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        events = list(events_of(response))
    (name, started), *events = events
    assert name == f"{kind}.started" and len(started["ids"]) == 2 and started["seed"] == 2
    for index, id in enumerate(started["ids"]):
        *partials, (last, completed) = [(name, data) for name, data in events if data["id"] == id]
        assert last == f"{kind}.completed"
        tokens, _ = expected(HEAD, index, seed=2)
        file = base64.b64decode(completed["b64_json"])
        assert file == file_of(HEAD, tokens)
        assert completed["usage"]["output_tokens"] == len(tokens) == completed["new_tokens"]
        assert [data["partial_image_index"] for _, data in partials] == [0, 1, 2]
        final = pixels(file)
        for (name, data), patches in zip(partials, (1, 2, 3), strict=True):
            assert name == f"{kind}.partial_image" and data["index"] == index
            partial = pixels(base64.b64decode(data["b64_json"]))
            # What is finished is there already, all but the pixels that chroma smooths over a border.
            rows = 16 * (patches // 2) - 1
            assert (partial[:rows] == final[:rows]).all() or rows < 0
            assert not (partial == final).all()
            # kept under its id
            assert slow_server.client.get(f"/v1/images/{id}.jpg").content == file


def test_a_picture_is_painted_while_it_is_made(slow_server):
    body = {"seed": 2, "stream": True}
    with slow_server.client.stream("POST", "/v1/images/generations", json=body) as making:
        events = events_of(making)
        _, started = next(events)
        url = f"/v1/images/{started['ids'][0]}.jpg"
        pieces, times = [], []
        with slow_server.client.stream("GET", url) as response:
            assert response.headers["content-type"] == "image/jpeg"
            assert "content-length" not in response.headers
            for piece in response.iter_raw():
                pieces.append(piece)
                times.append(time.monotonic())
        _, completed = list(events)[-1]
    assert len(pieces) > 10 and times[-1] - times[0] > 0.1
    assert pieces[0].startswith(CODEC.file_head)
    assert b"".join(pieces) == base64.b64decode(completed["b64_json"])


@pytest.mark.parametrize("how", ["DELETE", "cancel"])
def test_one_picture_is_stopped(slow_server, how):
    with slow_server.client.stream(
        "POST", "/v1/images/generations", json={"n": 2, "seed": 9, "stream": True, "ignore_eos": True}
    ) as making:
        events = events_of(making)
        first, second = next(events)[1]["ids"]
        time.sleep(0.1)
        if how == "DELETE":
            reply = slow_server.client.delete(f"/v1/images/{first}.jpg").json()
        else:
            reply = slow_server.client.post(f"/v1/images/{first}/cancel").json()
        assert reply == {"id": first, "finish_reason": "cancelled"}
        _, completed = next(events)
        assert completed["id"] == first and completed["finish_reason"] == "cancelled"
        assert slow_server.loop.open_requests == 1  # the other goes on
        slow_server.client.delete(f"/v1/images/{second}")
        assert next(events)[1]["id"] == second
        assert list(events) == []
    until(lambda: slow_server.loop.open_requests == 0)


def test_pictures_are_forgotten_after_their_time():
    with serving(ScriptedLoop(), picture_seconds=1.5) as server:
        [item] = server.client.post("/v1/images/generations", json={}).json()["data"]
        assert server.client.get(f"/v1/images/{item['id']}.jpg").status_code == 200
        time.sleep(1.6)
        assert server.client.get(f"/v1/images/{item['id']}.jpg").status_code == 404


class Stub:
    """A sample that grows by hand."""

    def __init__(self):
        self.data, self.finish_reason, self.token_ids = bytearray(), None, []


@pytest.mark.parametrize("damage", [None, b"\xff\xc4", b"\xff\xd9", b"\xff"])
def test_what_was_painted_stays_a_prefix_of_the_file(damage):
    """Byte by byte, and with a marker in the middle that does not belong there."""
    stream = STREAMS[3][len(CODEC.preamble) :]
    if damage is not None:
        stream = stream[:40] + damage + stream[40:]
    sample = Stub()
    picture = Picture(None, sample, CODEC, CODEC.preamble)
    painter, painted = Painter(picture), b""
    for byte in stream:
        painted += painter.new()
        sample.data.append(byte)
        assert CODEC.to_file(picture.stream).startswith(painted)
    sample.finish_reason = "stop"
    assert painted + painter.new() == CODEC.to_file(picture.stream)


def test_unfinished_pictures_end_with_a_whole_patch():
    sample = Stub()
    picture = Picture(None, sample, CODEC, CODEC.preamble)
    partials, shown = Partials(picture, 3), []
    for byte in STREAMS[3][len(CODEC.preamble) :]:
        sample.data.append(byte)
        shown += partials.new()
    assert [number for number, _ in shown] == [0, 1, 2]
    assert [CODEC.whole_patches(stream)[0] for _, stream in shown] == [1, 2, 3]
    assert all(stream[-2:] in (b"\xff\xd0", b"\xff\xd1", b"\xff\xd2") for _, stream in shown)
    assert list(Partials(picture, 0).new()) == []


def test_only_so_many_finished_pictures_are_kept(monkeypatch):
    monkeypatch.setattr("megatron_codec.inference.server.pictures.MAX_KEPT", 3)
    pictures, kept = Pictures(seconds=100), []
    for number in range(6):
        sample = Stub()
        sample.finish_reason = None if number == 0 else "stop"
        kept.append(Picture(None, sample, CODEC, b""))
        pictures.add(kept[-1])
    assert pictures.get(kept[0].id) is kept[0]  # still being made
    assert len(pictures._by_id) == 4
