"""What takes long is done in threads: on the server's own one every client would wait for it."""

import asyncio
import base64
from collections import Counter
from pathlib import Path

import pytest

from megatron_codec.codecs import JpegCodec
from megatron_codec.inference.server import completions, megatron
from megatron_codec.inference.server.completions import Completion
from megatron_codec.inference.server.protocol import CompletionBody
from megatron_codec.inference.server.service import Service
from megatron_codec.inference.server.settings import ServerConfig
from megatron_codec.inference.server.text import to_text
from tests.server.scripted import CODEC, STREAMS, ScriptedEngine, ScriptedLoop
from tests.server.test_completions import expected

TEXT = to_text(CODEC.prompt(STREAMS[0], 0.5))
JPEG = base64.b64encode(CODEC.to_file(STREAMS[0])).decode()


@pytest.fixture
def watched(monkeypatch):
    """Counts calls of what takes long, by name and by whether they were made on an event loop's thread."""
    calls = Counter()

    def watch(owner, name):
        real = getattr(owner, name)

        def call(*arguments, **settings):
            try:
                asyncio.get_running_loop()
                calls[name, "event loop"] += 1
            except RuntimeError:
                calls[name, "thread"] += 1
            return real(*arguments, **settings)

        monkeypatch.setattr(owner, name, call)

    for owner, name in [
        (JpegCodec, "encode"),
        (JpegCodec, "check"),
        (completions, "to_bytes"),
        (megatron, "to_bytes"),
        (ScriptedEngine, "request"),
        (completions, "file_b64"),
        (completions, "completion_logprobs"),
    ]:
        watch(owner, name)
    return calls


@pytest.mark.parametrize(
    ("route", "body", "names"),
    [
        (
            "/v1/completions",
            {"prompt": TEXT, "return_image": True, "logprobs": 1},
            ["to_bytes", "request", "check", "file_b64", "completion_logprobs"],
        ),
        (
            "/v1/completions",
            {"prompt": TEXT, "return_image": True, "stream": True},
            ["to_bytes", "request", "check", "file_b64"],
        ),
        ("/api", {"prompts": [TEXT], "tokens_to_generate": 5}, ["to_bytes", "request"]),
        ("/v1/images/generations", {"n": 2}, ["request", "check"]),
        ("/v1/images/generations", {"n": 2, "stream": True}, ["request", "check"]),
        ("/v1/images/edits", {"image": JPEG}, ["encode", "request", "check"]),
    ],
)
def test_what_takes_long_is_done_in_threads(server, watched, route, body, names):
    response = server.client.post(route, json=body | {"seed": 1})
    assert response.status_code == 200, response.text
    assert set(names) <= {name for name, _ in watched}
    assert not [name for name, where in watched if where == "event loop"]


def test_the_end_of_a_sample_is_not_lost_while_a_chunk_is_sent():
    """A client that reads slowly holds the sending of one chunk up, and meanwhile the sample ends."""

    async def slowly():
        loop = ScriptedLoop(token_seconds=0.01)
        service = Service(loop, ServerConfig(Path("runs/checkpoint")))
        body = {"prompt": [1, 2], "seed": 0, "max_tokens": 20, "stream": True, "return_token_ids": True}
        completion = Completion(service, CompletionBody(**body))
        await completion.begin()
        chunks = completion.chunks()
        data = [await anext(chunks)]
        while not completion.generation.done:
            await asyncio.sleep(0.01)
        data += [chunk async for chunk in chunks]
        loop.stop()
        service.close()
        return b"".join(data)

    tokens, reason = expected([1, 2], seed=0, max_tokens=20)
    sent = asyncio.run(slowly()).decode()
    assert f'"finish_reason":"{reason}"' in sent
    pieces = [part.partition("]")[0] for part in sent.split('"token_ids":[')[1:]]
    assert [int(id) for piece in pieces for id in piece.split(",") if id] == tokens
