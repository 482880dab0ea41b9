"""Everything a client can get wrong: a status from 400 to 499, and the name of the field."""

import base64
import io
import json

import httpx
import numpy as np
import pytest
from PIL import Image

from tests.server.scripted import CONTEXT, TOKENIZER, ScriptedLoop
from tests.server.serving import serving

COMPLETIONS, IMAGES, EDITS, API = "/v1/completions", "/v1/images/generations", "/v1/images/edits", "/api"
ROUTES = [COMPLETIONS, IMAGES, EDITS, API]


@pytest.fixture(scope="module")
def server():
    with serving(
        ScriptedLoop(), max_n=8, max_tokens=300, max_body_bytes=200_000, max_upload_pixels=10_000
    ) as s:
        yield s


def png(width=32, height=32, **options):
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(noise).save(buffer, "PNG", **options)
    return buffer.getvalue()


def refused(response: httpx.Response, status=400, param=None):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["code"] == status and error["message"] and error["type"]
    assert error["param"] == param, error
    if param in ("prompt", "n", "seed", "temperature"):
        assert param in error["message"]
    return error["message"]


NAN, INF = float("nan"), float("inf")
P = {"prompt": [1]}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [[1], []]}, "prompt"),
        ({"prompt": [[1], "a"]}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [1.0]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": [10**30]}, "prompt"),
        ({"prompt": [TOKENIZER.num_tokens]}, "prompt"),
        ({"prompt": [[1], [99999]]}, "prompt"),
        ({"prompt": [[[1]]]}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": 7}, "prompt"),
        ({"prompt": "a cat"}, "prompt"),
        ({"prompt": "\u2900"}, "prompt"),
        ({"prompt": "\U0001f408"}, "prompt"),
        ({"prompt": [1] * CONTEXT}, "prompt"),
        ({"prompt": "\u28ff" * CONTEXT}, "prompt"),
        ({"prompt": [[1]] * 9}, "n"),
        (P | {"n": 0}, "n"),
        (P | {"n": -1}, "n"),
        (P | {"n": 9}, "n"),
        (P | {"n": 10**12}, "n"),
        (P | {"n": "2"}, "n"),
        (P | {"n": 1.5}, "n"),
        (P | {"max_tokens": 0}, "max_tokens"),
        (P | {"max_tokens": -5}, "max_tokens"),
        (P | {"max_tokens": -5, "echo": True}, "max_tokens"),
        (P | {"max_tokens": 301}, "max_tokens"),
        (P | {"max_tokens": 10**40}, "max_tokens"),
        (P | {"temperature": NAN}, "temperature"),
        (P | {"temperature": INF}, "temperature"),
        (P | {"temperature": -0.1}, "temperature"),
        (P | {"temperature": "hot"}, "temperature"),
        (P | {"temperature": [1]}, "temperature"),
        (P | {"top_p": 0}, "top_p"),
        (P | {"top_p": 1.1}, "top_p"),
        (P | {"top_p": NAN}, "top_p"),
        (P | {"top_k": -2}, "top_k"),
        (P | {"top_k": 1.5}, "top_k"),
        (P | {"min_p": -1}, "min_p"),
        (P | {"min_p": 2}, "min_p"),
        (P | {"seed": 2**63}, "seed"),
        (P | {"seed": "x"}, "seed"),
        (P | {"logprobs": 21}, "logprobs"),
        (P | {"logprobs": -1}, "logprobs"),
        (P | {"logprobs": True}, "logprobs"),
        (P | {"stop": ["a"]}, "stop"),
        (P | {"stop": "\u2800" * 129}, "stop"),
        (P | {"stop": ["\u2800"] * 17}, "stop"),
        (P | {"stop_token_ids": [99999]}, "stop_token_ids"),
        (P | {"stream_options": {"include_usage": True}}, "stream_options"),
        (P | {"stream": True, "stream_options": 5}, "stream_options"),
        (P | {"stream": "yes"}, "stream"),
        (P | {"best_of": 2}, "best_of"),
        (P | {"suffix": "\u2800"}, "suffix"),
        (P | {"logit_bias": {"5": 1}}, "logit_bias"),
        (P | {"presence_penalty": 0.5}, "presence_penalty"),
        (P | {"frequency_penalty": NAN}, "frequency_penalty"),
        (P | {"repetition_penalty": 1.1}, "repetition_penalty"),
        (P | {"model": 5}, "model"),
        ([], None),
        ("prompt", None),
        (None, None),
        (5, None),
    ],
    ids=lambda value: repr(value)[:60],
)
def test_completions(server, body, param):
    """Sent as Python's json writes it, which has NaN and Infinity."""
    headers = {"content-type": "application/json"}
    message = refused(server.client.post(COMPLETIONS, content=json.dumps(body), headers=headers), 400, param)
    assert message.isascii()
    if isinstance(body, dict) and param != "stream":
        content = json.dumps(body | {"stream": body.get("stream", True)})
        if param != "stream_options":
            refused(server.client.post(COMPLETIONS, content=content, headers=headers), 400, param)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b'{"prompt": "\xff\xfe"}',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}",
        b'{"a":' * 20_000 + b"1" + b"}" * 20_000,
        b'{"n": ' + b"9" * 10_000 + b"}",
        b"\x00" * 100,
        "{}".encode("utf-16"),
    ],
    ids=lambda content: repr(content[:15]),
)
def test_bodies_that_are_no_json(server, route, content):
    response = server.client.post(route, content=content, headers={"content-type": "application/json"})
    refused(response, 400)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/xml"])
def test_other_types_of_bodies(server, route, kind):
    message = refused(
        server.client.post(route, content=b"{}", headers={"content-type": kind}), 415, "content-type"
    )
    assert "application/json" in message


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"n": 0}, "n"),
        ({"n": 9}, "n"),
        ({"size": "64x64"}, "size"),
        ({"size": 32}, "size"),
        ({"prompt": "a cat"}, "prompt"),
        ({"response_format": "url"}, "response_format"),
        ({"partial_images": -1}, "partial_images"),
        ({"temperature": NAN}, "temperature"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"output_format": "png"}, "output_format"),
        ({"mask": "x"}, "mask"),
    ],
    ids=repr,
)
def test_generations(server, body, param):
    headers = {"content-type": "application/json"}
    refused(server.client.post(IMAGES, content=json.dumps(body), headers=headers), 400, param)


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "cannot be read"),
        (b"not a picture", "cannot be read"),
        (png()[:100], "cannot be read"),
        (b"\xff\xd8\xff\xd9", "cannot be read"),
        (b"GIF89a" + bytes(5), "cannot be read"),
        (png(200, 60), "12000 pixels"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "cannot be read"),
    ],
    ids=lambda value: repr(value)[:25],
)
def test_uploads_that_are_no_picture(server, data, why):
    assert why in refused(server.client.post(EDITS, files={"image": ("../../x.png", data)}), 400, "image")
    encoded = base64.b64encode(data).decode()
    refused(server.client.post(EDITS, json={"image": encoded}), 400, "image")


def test_a_decompression_bomb(server):
    """A file of kilobytes that says it has 2.5 gigapixels is refused before it is decoded."""
    import struct
    import zlib

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    idat = zlib.compress(bytes(10**6))
    bomb = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", idat) + chunk(b"IEND", b"")
    refused(server.client.post(EDITS, files={"image": bomb}), 400, "image")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt_ratio": "2"}, "prompt_ratio"),
        ({"prompt_ratio": "nan"}, "prompt_ratio"),
        ({"prompt_ratio": "half"}, "prompt_ratio"),
        ({"n": "0"}, "n"),
        ({"n": "9" * 30}, "n"),
        ({"temperature": "inf"}, "temperature"),
        ({"seed": "1.5"}, "seed"),
        ({"size": "1x1"}, "size"),
        ({"model": "gpt"}, None),
    ],
    ids=repr,
)
def test_edits(server, fields, param):
    response = server.client.post(EDITS, files={"image": png()}, data=fields)
    refused(response, 404 if param is None else 400, param or "model")


def test_edits_without_a_picture(server):
    refused(server.client.post(EDITS, files={"other": png()}), 400, "image")
    refused(server.client.post(EDITS, json={}), 400, "image")
    refused(server.client.post(EDITS, json={"image": "***"}), 400, "image")
    headers = {"content-type": "multipart/form-data; boundary=x"}
    refused(server.client.post(EDITS, content=b"--y\r\nnothing", headers=headers), 400, None)
    refused(
        server.client.post(EDITS, content=b"", headers={"content-type": "multipart/form-data"}), 400, None
    )


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompts"),
        ({"prompts": []}, "prompts"),
        ({"prompts": "\u2801"}, "prompts"),
        ({"prompts": ["a cat"]}, "prompts"),
        ({"prompts": [""]}, "prompts"),
        ({"prompts": [5]}, "prompts.0"),
        ({"prompts": ["\u2801"] * 129}, "prompts"),
        ({"prompts": ["\u2801"] * 9}, "n"),
        ({"sentences": ["\u2801"], "prompts": ["\u2801"]}, "sentences"),
        ({"prompts": ["\u2801"], "tokens_to_generate": -1}, "tokens_to_generate"),
        ({"prompts": ["\u2801"], "tokens_to_generate": 5.5}, "tokens_to_generate"),
        ({"prompts": ["\u2801"], "temperature": 101}, "temperature"),
        ({"prompts": ["\u2801"], "top_k": 1001}, "top_k"),
        ({"prompts": ["\u2801"], "top_p": 1.5}, "top_p"),
        ({"prompts": ["\u2801"], "random_seed": -2}, "random_seed"),
        ({"prompts": ["\u2801"], "top_p_decay": 0.5}, "top_p_decay"),
        ({"prompts": ["\u2801"], "beam_width": 4}, "beam_width"),
        ({"prompts": ["\u2801"], "stop_on_eol": True}, "stop_on_eol"),
        ({"prompts": ["\u2801"], "logprobs": "yes"}, "logprobs"),
    ],
    ids=repr,
)
def test_megatron(server, body, param):
    refused(server.client.put(API, json=body), 400, param)


def test_unknown_models_paths_and_methods(server):
    refused(server.client.post(COMPLETIONS, json=P | {"model": "gpt"}), 404, "model")
    refused(server.client.post(IMAGES, json={"model": "gpt"}), 404, "model")
    refused(server.client.get("/v1/models/gpt"), 404, "model")
    refused(server.client.get("/nothing"), 404)
    refused(server.client.get("/v1/images/nothing.jpg"), 404, "id")
    refused(server.client.delete("/v1/images/nothing"), 404, "id")
    refused(server.client.post("/v1/images/nothing/cancel"), 404, "id")
    refused(server.client.get("/v1/images/..%2f..%2fetc%2fpasswd"), 404)
    for method, route in (("GET", COMPLETIONS), ("DELETE", "/health"), ("GET", API), ("PATCH", IMAGES)):
        response = server.client.request(method, route)
        refused(response, 405)
        assert response.headers["allow"]
    for name in ("checkpoint", "jpeglm"):
        assert server.client.post(COMPLETIONS, json=P | {"model": name, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize("route", ROUTES)
def test_large_bodies(server, route):
    headers = {"content-type": "application/json"}
    content = b'{"prompt": "' + b"x" * 200_000 + b'"}'
    refused(server.client.post(route, content=content, headers=headers), 413, "body")

    def unannounced():
        for start in range(0, len(content), 1000):
            yield content[start : start + 1000]

    refused(server.client.post(route, content=unannounced(), headers=headers), 413, "body")
    refused(server.client.post(EDITS, files={"image": bytes(200_001)}), 413, "body")


def test_pages_of_other_sites(server):
    headers = {"origin": "https://elsewhere.example"}
    refused(server.client.post(COMPLETIONS, json=P, headers=headers), 403, "origin")
    refused(
        server.client.post(EDITS, files={"image": png()}, headers=headers | {"origin": "null"}), 403, "origin"
    )
    headers = {"origin": server.url}
    assert server.client.post(COMPLETIONS, json=P | {"max_tokens": 1}, headers=headers).status_code == 200


def test_the_server_is_well_after_all_that(server):
    assert server.client.get("/health").json() == {"status": "ok"}
    assert server.loop.open_requests == 0
