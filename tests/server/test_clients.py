"""Programs of others: OpenAI's Python client, and the calls of the paper's public script."""

import base64
import io

import httpx
import openai
import pytest
from PIL import Image

from megatron_codec.inference.server.text import to_bytes, to_text
from tests.server.scripted import CODEC, STREAMS, TOKENIZER
from tests.server.test_completions import expected, text_of

PROMPT = [TOKENIZER.bos, 1, 2, 3]


@pytest.fixture
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_openai_completes(client):
    reply = client.completions.create(model="jpeglm", prompt=PROMPT, n=2, seed=5, max_tokens=12, logprobs=1)
    for sample, choice in enumerate(reply.choices):
        tokens, reason = expected(PROMPT, sample, seed=5, max_tokens=12)
        assert choice.text == text_of(tokens)
        assert choice.finish_reason == reason
        assert len(choice.logprobs.token_logprobs) == len(tokens)
    assert reply.usage.prompt_tokens == 4
    assert reply.usage.prompt_tokens_details.cached_tokens == 0


def test_openai_streams(client):
    tokens, reason = expected(PROMPT, seed=6)
    chunks = list(
        client.completions.create(
            model="jpeglm", prompt=PROMPT, seed=6, stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(choice.text for chunk in chunks for choice in chunk.choices) == text_of(tokens)
    assert [choice.finish_reason for chunk in chunks for choice in chunk.choices][-1] == reason
    assert chunks[-1].usage.completion_tokens == len(tokens)


def test_openai_lists_models(client):
    assert [model.id for model in client.models.list()] == ["checkpoint", "jpeglm"]
    assert client.models.retrieve("jpeglm").max_model_len == 400


def test_openai_is_told_its_errors(client):
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.completions.create(model="gpt", prompt=PROMPT)
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="jpeglm", prompt=PROMPT, temperature=-1)
    assert caught.value.param == "temperature"


def test_openai_makes_and_edits_pictures(client):
    reply = client.images.generate(model="jpeglm", prompt="", n=2, extra_body={"seed": 1})
    assert len(reply.data) == 2
    for item in reply.data:
        picture = Image.open(io.BytesIO(base64.b64decode(item.b64_json)))
        picture.load()
        assert picture.size == (32, 32)
    file = io.BytesIO(CODEC.to_file(STREAMS[1]))
    file.name = "half.jpg"
    extra = {"seed": 1, "prompt_ratio": 0.5}
    reply = client.images.edit(model="jpeglm", prompt="", image=file, extra_body=extra)
    [item] = reply.data
    assert reply.usage.output_tokens == item.new_tokens and item.seed == 1


def test_openai_streams_pictures(client):
    events = list(
        client.images.generate(
            model="jpeglm", prompt="", stream=True, partial_images=2, extra_body={"seed": 3}
        )
    )
    assert events[0].type == "image_generation.started"
    assert events[-1].type == "image_generation.completed"
    assert {event.type for event in events[1:-1]} <= {"image_generation.partial_image"}
    assert base64.b64decode(events[-1].b64_json).startswith(b"\xff\xd8")


def test_the_calls_of_the_papers_script(server):
    """Shaped as those of xhan77/jpeg-lm's run.py: many prompts of ids, cut after restart markers, and
    the bytes taken from the text."""
    ratio = 0.5
    prompts, cuts = [], []
    for stream in STREAMS[:3]:
        places = [i + 2 for i in range(len(stream)) if stream[i : i + 2] in (b"\xff\xd0", b"\xff\xd1")]
        cut = stream[: places[int(len(places) * ratio)]]
        cuts.append(cut)
        prompts.append([TOKENIZER.bos, *TOKENIZER.encode(cut).tolist()])
    data = {
        "model": "jpeglm",
        "prompt": prompts,
        "max_tokens": 300,
        "temperature": 1.0,
        "top_p": 0.9,
        "top_k": 50,
        "spaces_between_special_tokens": False,
        "stream": False,
    }
    response = httpx.post(f"{server.url}/v1/completions", headers={"User-Agent": "Test Client"}, json=data)
    output = response.json()
    for i, cut in enumerate(cuts):
        text = output["choices"][i]["text"]
        made = bytes(ord(c) - 10240 for c in text)
        picture = CODEC.decode(cut + made)
        assert picture.size == (32, 32)
        assert made == to_bytes(text, "text") and to_text(made) == text
