"""`POST /v1/completions` against the scripted engine alone."""

import base64
import io
import json

import pytest
from PIL import Image

from megatron_codec.inference import Sampling
from megatron_codec.inference.server.text import Vocabulary, to_bytes, to_text
from tests.server.scripted import CODEC, CONTEXT, STREAMS, TOKENIZER, logprob, script

VOCABULARY = Vocabulary(TOKENIZER)
BOS = TOKENIZER.bos
HEAD = [BOS, *TOKENIZER.encode_to_list(CODEC.preamble)]


def expected(prompt, sample=0, **settings):
    return script(tuple(prompt), Sampling(**settings), sample)


def text_of(ids):
    return to_text(VOCABULARY.join(ids))


def complete(server, **body):
    response = server.client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return response.json()


def streamed(server, **body):
    """The chunks of a stream, which has to end as it should."""
    with server.client.stream("POST", "/v1/completions", json=body | {"stream": True}) as response:
        assert response.status_code == 200, response.read()
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def test_text_is_a_character_a_byte():
    data = bytes(range(256))
    assert [ord(c) for c in to_text(data)] == list(range(0x2800, 0x2900))
    assert to_bytes(to_text(data), "prompt") == data
    assert to_text(b"") == "" and to_bytes("", "prompt") == b""


@pytest.mark.parametrize(
    ("prompt", "ids"),
    [
        ("", [[BOS]]),
        (to_text(b"\xff\xd8\xff"), [[BOS, *TOKENIZER.encode_to_list(b"\xff\xd8\xff")]]),
        ([to_text(b"a"), to_text(b"b")], [[BOS, 97], [BOS, 98]]),
        ([BOS, 5, 6], [[BOS, 5, 6]]),
        ([[7], [BOS, 8, 9]], [[7], [BOS, 8, 9]]),
    ],
)
def test_the_four_shapes_of_a_prompt(server, prompt, ids):
    reply = complete(server, prompt=prompt, seed=3, max_tokens=20, n=2, return_token_ids=True)
    assert [choice["index"] for choice in reply["choices"]] == list(range(2 * len(ids)))
    for choice in reply["choices"]:
        tokens, reason = expected(ids[choice["index"] // 2], choice["index"] % 2, seed=3, max_tokens=20)
        assert choice["prompt_token_ids"] == ids[choice["index"] // 2]
        assert choice["token_ids"] == tokens
        assert choice["text"] == text_of(tokens)
        assert choice["finish_reason"] == reason
        assert choice["logprobs"] is None
    new = sum(len(choice["token_ids"]) for choice in reply["choices"])
    old = sum(map(len, ids))
    assert reply["usage"] == {
        "prompt_tokens": old,
        "completion_tokens": new,
        "total_tokens": old + new,
        "prompt_tokens_details": {"cached_tokens": 0},
    }
    assert reply["object"] == "text_completion" and reply["model"] == "checkpoint"


def test_goes_on_to_the_end_of_the_context(server):
    [choice] = complete(server, prompt=[1, 2], seed=0, ignore_eos=True, return_token_ids=True)["choices"]
    assert len(choice["token_ids"]) == CONTEXT - 2
    assert choice["finish_reason"] == "length"


def test_a_seed_repeats_and_without_one_nothing_does(server):
    def texts(**more):
        return [choice["text"] for choice in complete(server, prompt=[1], n=2, **more)["choices"]]

    assert texts(seed=5) == texts(seed=5) != texts(seed=6)
    assert texts(seed=None) != texts()
    assert len(set(texts(seed=5))) == 2


def test_logprobs_and_echo(server):
    prompt = [BOS, 280, 5]
    reply = complete(server, prompt=prompt, seed=1, max_tokens=9, logprobs=2, echo=True)
    [choice] = reply["choices"]
    tokens, _ = expected(prompt, seed=1, max_tokens=9, logprobs=2)
    every = [*prompt, *tokens]
    assert choice["text"] == text_of(every)
    found = choice["logprobs"]
    assert found["tokens"] == [VOCABULARY.name[id] for id in every]
    assert found["token_logprobs"] == [None, *map(logprob, every[1:])]
    assert found["top_logprobs"][0] is None
    for id, name, top in zip(every[1:], found["tokens"][1:], found["top_logprobs"][1:], strict=True):
        assert top[name] in (logprob(id), 0.0, -50.0, -9999.0)
    assert -9999.0 in found["top_logprobs"][1].values()  # what has no probability at all
    for offset, name in zip(found["text_offset"], found["tokens"], strict=True):
        assert name in ("<s>", "</s>") or choice["text"][offset:].startswith(name)
    # streamed: the same in pieces
    chunks = streamed(server, prompt=prompt, seed=1, max_tokens=9, logprobs=2, echo=True)
    pieces = [chunk["choices"][0] for chunk in chunks]
    assert "".join(piece["text"] for piece in pieces) == choice["text"]
    for name, values in found.items():
        assert [value for piece in pieces for value in piece["logprobs"][name]] == values


def test_zero_logprobs_are_those_of_the_tokens_alone(server):
    [choice] = complete(server, prompt=[5], seed=1, max_tokens=3, logprobs=0)["choices"]
    assert all(len(top) == 1 for top in choice["logprobs"]["top_logprobs"])
    assert [list(top) for top in choice["logprobs"]["top_logprobs"]] == [
        [token] for token in choice["logprobs"]["tokens"]
    ]


def test_a_prompt_can_be_scored_alone(server):
    prompt = [BOS, 7, 8]
    [choice] = complete(server, prompt=prompt, max_tokens=0, echo=True, logprobs=0)["choices"]
    assert choice["text"] == text_of(prompt)
    assert choice["finish_reason"] == "length"
    assert choice["logprobs"]["token_logprobs"] == [None, logprob(7), logprob(8)]
    [choice] = complete(server, prompt=prompt, max_tokens=0, echo=True)["choices"]
    assert choice["text"] == text_of(prompt) and choice["logprobs"] is None


@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_brings_the_same(server, n):
    body = {"prompt": [[1, 2], HEAD], "seed": 4, "n": n, "return_token_ids": True, "return_image": True}
    whole = complete(server, **body)
    chunks = streamed(server, **body, stream_options={"include_usage": True})
    *chunks, last = chunks
    assert last["choices"] == [] and last["usage"] == whole["usage"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for choice in whole["choices"]:
        pieces = [c for chunk in chunks for c in chunk["choices"] if c["index"] == choice["index"]]
        assert all(chunk["usage"] is None for chunk in chunks)
        assert "".join(piece["text"] for piece in pieces) == choice["text"]
        assert [id for piece in pieces for id in piece["token_ids"]] == choice["token_ids"]
        assert pieces[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        assert not any(piece["finish_reason"] for piece in pieces[:-1])
        assert pieces[-1]["finish_reason"] == choice["finish_reason"]
        assert pieces[-1]["b64_json"] == choice["b64_json"]
    assert "usage" not in streamed(server, prompt=[1], max_tokens=2)[0]


def test_stop_strings(server):
    prompt, settings = [3, 1, 4], {"seed": 2, "max_tokens": 50}
    tokens, _ = expected(prompt, **settings)
    data = VOCABULARY.join(tokens)
    for stop in (data[5:9], data[5:6], data[:2]):
        cut = data.index(stop)
        body = {"prompt": prompt, **settings, "stop": [to_text(b"never these"), to_text(stop)]}
        [choice] = complete(server, **body)["choices"]
        assert to_bytes(choice["text"], "") == data[:cut]
        assert choice["finish_reason"] == "stop" and choice["stop_reason"] == to_text(stop)
        pieces = [chunk["choices"][0]["text"] for chunk in streamed(server, **body)]
        assert "".join(pieces) == choice["text"]
        [shown] = complete(server, **body, include_stop_str_in_output=True)["choices"]
        assert to_bytes(shown["text"], "") == data[:cut] + stop
    # a string that only seems to begin
    almost = data[5:9] + bytes((data[9] ^ 1,))
    chunks = streamed(server, prompt=prompt, **settings, stop=to_text(almost))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == to_text(data)
    assert server.loop.open_requests == 0 or server.client.get("/health")  # what stopped was let go


def test_stop_tokens(server):
    prompt, settings = [3, 1, 4], {"seed": 2, "max_tokens": 50}
    tokens, _ = expected(prompt, **settings)
    body = {"prompt": prompt, **settings, "stop_token_ids": [tokens[4]], "return_token_ids": True}
    end = tokens.index(tokens[4])
    [choice] = complete(server, **body)["choices"]
    assert choice["token_ids"] == tokens[: end + 1]
    assert choice["text"] == text_of(tokens[:end])
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", tokens[4])
    [choice] = complete(server, **body, include_stop_str_in_output=True)["choices"]
    assert choice["text"] == text_of(tokens[: end + 1])


def test_the_whole_picture(server):
    half = CODEC.prompt(STREAMS[0], 0.5)
    [choice] = complete(server, prompt=to_text(half), seed=1, return_image=True)["choices"]
    file = base64.b64decode(choice["b64_json"])
    assert file == CODEC.to_file(half + to_bytes(choice["text"], ""))
    picture = Image.open(io.BytesIO(file))
    picture.load()
    assert picture.size == (32, 32) and choice["valid"]
    [choice] = complete(server, prompt=[1, 2, 3], max_tokens=2, return_image=True)["choices"]
    assert choice["b64_json"] is None and not choice["valid"]  # does not begin like a picture


def test_fields_of_other_servers_are_let_through(server):
    neutral = {
        "suffix": None,
        "logit_bias": {},
        "presence_penalty": 0,
        "frequency_penalty": 0.0,
        "best_of": 2,
        "user": "somebody",
        "spaces_between_special_tokens": False,
        "something_new": [1, {"a": float(2)}],
        "top_k": -1,
    }
    reply = complete(server, prompt=[1], n=2, seed=1, max_tokens=3, **neutral)
    assert reply["choices"] == complete(server, prompt=[1], n=2, seed=1, max_tokens=3)["choices"]
