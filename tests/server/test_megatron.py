"""`PUT /api` as Megatron-LM's, without its faults."""

import pytest

from megatron_codec.inference.server.text import to_text
from tests.server.scripted import TOKENIZER, logprob
from tests.server.test_completions import VOCABULARY, expected, text_of

PROMPTS = [to_text(b"\xff\xd8ab"), to_text(b"cd")]
IDS = [TOKENIZER.encode_to_list(data) for data in (b"\xff\xd8ab", b"cd")]


@pytest.mark.parametrize("method", ["PUT", "POST"])
@pytest.mark.parametrize("bos", [False, True])
def test_answers(server, method, bos):
    body = {
        "prompts": PROMPTS,
        "tokens_to_generate": 9,
        "logprobs": True,
        "random_seed": 3,
        "add_BOS": bos,
        "top_k": 5,  # with top_p, which Megatron-LM refuses
        "top_p": 0.9,
        "no_log": True,
        "top_p_decay": 0.0,
        "stop_on_eol": False,
    }
    reply = server.client.request(method, "/api", json=body)
    assert reply.status_code == 200, reply.text
    reply = reply.json()
    assert set(reply) == {"text", "segments", "tokens", "logprobs"}
    for number, ids in enumerate(IDS):
        prompt = ([TOKENIZER.bos] if bos else []) + ids
        tokens, _ = expected(prompt, seed=3, max_tokens=9)
        every = [*prompt, *tokens]
        assert reply["tokens"][number] == every
        assert reply["text"][number] == text_of(every)
        assert reply["segments"][number] == [VOCABULARY.name[id] for id in every]
        assert reply["logprobs"][number] == [logprob(id) for id in every[1:]]


def test_the_seed_is_obeyed(server):
    def text(**more):
        body = {"prompts": PROMPTS[:1], "tokens_to_generate": 20} | more
        return server.client.put("/api", json=body).json()["text"]

    assert text(random_seed=1) == text(random_seed=1) != text(random_seed=2)
    assert text() != text()
    assert server.client.put("/api", json={"prompts": PROMPTS}).json()["logprobs"] is None


def test_prompts_can_be_scored_alone(server):
    body = {"prompts": PROMPTS, "tokens_to_generate": 0, "logprobs": True}
    reply = server.client.put("/api", json=body).json()
    assert reply["tokens"] == IDS
    assert reply["logprobs"] == [[logprob(id) for id in ids[1:]] for ids in IDS]


def test_an_empty_prompt_needs_bos(server):
    reply = server.client.put("/api", json={"prompts": [""], "add_BOS": True, "tokens_to_generate": 3})
    assert reply.json()["tokens"][0][0] == TOKENIZER.bos
