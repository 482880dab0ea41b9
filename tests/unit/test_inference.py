"""The engine against one full forward pass, Hugging Face's `generate`, and itself in other company."""

import numpy as np
import pytest
import torch
from transformers import GenerationConfig, LogitsProcessorList, SuppressTokensLogitsProcessor

from megatron_codec.errors import UserError
from megatron_codec.inference import Engine
from megatron_codec.inference.config import EngineConfig
from megatron_codec.tokenizer import Tokenizer
from tests.llama import NUM_TOKENS, SMALL, hugging_face_twin, small_model
from tests.tiny import CODEC
from tests.unconstrained import Sampling

CONTEXT = SMALL.seq_length


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    assert tokenizer.num_tokens == NUM_TOKENS
    return tokenizer


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    return make_engine(tokenizer)


def make_engine(tokenizer: Tokenizer, **config) -> Engine:
    module, layout = small_model()
    return Engine(module, SMALL, tokenizer, CODEC, layout, EngineConfig(**config))


def endless(engine: Engine) -> Engine:
    """The engine, never ending a sample by itself."""
    engine.drawing.forbidden[engine.tokenizer.eos] = -torch.inf
    return engine


@pytest.fixture(scope="module")
def prompts(tokenizer) -> list[list[int]]:
    """Of unequal lengths, BOS first."""
    rng = np.random.default_rng(0)
    return [[tokenizer.bos, *rng.integers(0, 320, length).tolist()] for length in (0, 4, 99, 29, 63, 64)]


@torch.no_grad()
def full_logits(ids: list[int]) -> torch.Tensor:
    """Of all positions, by the model of training in one forward pass, [s, v]."""
    tokens = torch.tensor([ids])
    return small_model()[0](tokens, torch.arange(len(ids))[None], attention_mask=None)[0]


@pytest.mark.parametrize("chunk", [1, 7, 64, 1000])
def test_logits_are_those_of_one_full_forward_pass(chunk, tokenizer, prompts, monkeypatch):
    """After every prompt and new token, whatever else is computed, and with prompts shared by samples."""
    engine = endless(make_engine(tokenizer, prefill_chunk_size=chunk))
    seen = {}
    original = Engine._sample

    def recorded(self, samples, logits):
        for sample, row in zip(samples, logits, strict=True):
            seen.setdefault((tuple(sample.request.prompt), sample.number), []).append(row)
        original(self, samples, logits)

    monkeypatch.setattr(Engine, "_sample", recorded)
    completions = engine.generate(prompts, Sampling(temperature=2.0, max_tokens=20, n=3))
    allowed = torch.isfinite(engine.drawing.forbidden)
    for number, completion in enumerate(completions):
        start = len(completion.prompt_ids) - 1
        expected = full_logits(completion.prompt_ids + completion.token_ids[:-1])[start:]
        ours = torch.stack(seen[tuple(completion.prompt_ids), number % 3])
        difference = (ours - expected)[:, allowed].abs().max() / expected.abs().max()
        assert difference < 1e-5, f"prompt of {start + 1} tokens: {difference:.2e}"
        # and the log-probabilities that are handed out
        logprobs = torch.log_softmax(expected + engine.drawing.forbidden, -1)
        chosen = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(completion.logprobs), chosen, atol=2e-5, rtol=1e-5)


def test_a_request_gives_the_same_tokens_alone_or_in_company(engine, prompts):
    settings = {"temperature": 1.3, "top_k": 200, "top_p": 0.98, "seed": 4}
    together = engine.generate(prompts, Sampling(**settings, n=3))
    expected = [c.token_ids for c in together]
    assert len({tuple(ids) for ids in expected}) == len(expected) == 3 * len(prompts)
    assert {c.finish_reason for c in together} == {"stop", "length"}  # rows leave the batch at both
    for config in (
        {"max_batch_size": 4},
        {"max_batch_size": 7, "prefill_chunk_size": 5},
        {"cache_tokens": 256},  # samples have to make room for each other
    ):
        again = make_engine(engine.tokenizer, **config).generate(prompts, Sampling(**settings, n=3))
        assert [c.token_ids for c in again] == expected, config
    backwards = engine.generate(prompts[::-1], Sampling(**settings, n=3))
    assert [c.token_ids for c in backwards[::-1]] == [
        ids for start in range(0, len(expected), 3) for ids in expected[start : start + 3][::-1]
    ]
    for number, prompt in enumerate(prompts):
        [alone] = engine.generate([prompt], Sampling(**settings))
        assert alone.token_ids == expected[3 * number]
        assert alone.prompt_ids == prompt
    others = engine.generate(prompts, Sampling(**settings | {"seed": 5}, n=3))
    assert not {tuple(c.token_ids) for c in others} & {tuple(ids) for ids in expected}


def test_greedy_is_that_of_hugging_face(engine, prompts):
    twin = hugging_face_twin(small_model()[0], SMALL)
    never = torch.isinf(engine.drawing.forbidden).nonzero()[:, 0].tolist()
    greedy = engine.generate(prompts, Sampling(temperature=0, max_tokens=25))
    for prompt, ours in zip(prompts, greedy, strict=True):
        theirs = twin.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            generation_config=GenerationConfig(
                max_new_tokens=25, do_sample=False, eos_token_id=engine.tokenizer.eos, pad_token_id=0
            ),
            logits_processor=LogitsProcessorList([SuppressTokensLogitsProcessor(never, device="cpu")]),
        )
        assert ours.token_ids == theirs[0, len(prompt) :].tolist()
    again = engine.generate(prompts, Sampling(temperature=0, max_tokens=25, seed=9, n=2))
    assert [c.token_ids for c in again] == [c.token_ids for c in greedy for _ in range(2)]


def test_the_memory_that_is_said_is_that_of_the_tensors(engine):
    layers = engine.decoder.layers
    assert engine.memory.cache == sum(
        x.numel() * x.element_size() for y in layers for x in (y.keys, y.values)
    )
    assert engine.memory.weights == 4 * sum(p.numel() for p in small_model()[0].parameters())


def test_log_probabilities_of_prompts_and_of_other_tokens(tokenizer, prompts):
    engine = make_engine(tokenizer, prefill_chunk_size=33)
    got = []

    def ask(**settings):
        request = engine.request(prompts[2], Sampling(**settings), got.extend)
        engine.add(request)
        while engine.busy:
            engine.step()
        return request

    ask(max_tokens=1)  # the prompt is known now, and computed again all the same
    got.clear()
    request = ask(prompt_logprobs=True, logprobs=3, max_tokens=4, n=2, seed=5)
    full = torch.log_softmax(full_logits(prompts[2])[:-1] + engine.drawing.forbidden, -1)
    assert request.prompt_logprobs[0] is None and len(request.prompt_logprobs) == 100
    expected = full.gather(1, torch.tensor(prompts[2][1:])[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(request.prompt_logprobs[1:]), expected, atol=2e-5, rtol=1e-5)
    assert request.prompt_top_logprobs[0] == {}
    for top, row in zip(request.prompt_top_logprobs[1:], full, strict=True):
        values, ids = row.topk(3)
        assert list(top) == ids.tolist()
        assert list(top.values()) == pytest.approx(values.tolist(), abs=2e-5)
    assert len(got) == 8
    for event in got:
        [top], [token], [logprob] = event.top_logprobs, event.token_ids, event.logprobs
        assert len(top) == 3 and list(top.values()) == sorted(top.values(), reverse=True)
        assert top.get(token, logprob) == logprob <= max(top.values())
    got.clear()
    request = ask(prompt_logprobs=True, max_tokens=0)
    assert [(e.token_ids, e.finish_reason) for e in got] == [((), "length")]
    torch.testing.assert_close(torch.tensor(request.prompt_logprobs[1:]), expected, atol=2e-5, rtol=1e-5)


def test_every_prompt_has_its_own_settings(engine, prompts):
    each = [
        Sampling(temperature=0, max_tokens=9),
        Sampling(temperature=2.0, seed=1, max_tokens=30, min_p=0.05),
        Sampling(top_k=5, seed=2, max_tokens=20, stop_token_ids=(7, 8, 9, 10, 11, 12)),
        Sampling(top_p=0.5, seed=3, max_tokens=12, n=2, ignore_eos=True),
    ]
    together = engine.generate(prompts[:4], each)
    alone = [c for p, s in zip(prompts[:4], each, strict=True) for c in engine.generate([p], s)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.finish_reason for c in together] == [c.finish_reason for c in alone]
    for completion in together[3:]:
        assert len(completion.token_ids) == 12


def test_stop_tokens_and_eos(engine, prompts):
    stops = tuple(range(0, 320, 3))
    completions = engine.generate(prompts, Sampling(temperature=2.0, seed=8, stop_token_ids=stops))
    assert {c.finish_reason for c in completions} == {"stop"}
    for completion in completions:
        *before, last = completion.token_ids
        assert last in stops and not set(before) & {*stops, engine.tokenizer.eos}
    on = engine.generate(prompts[:1], Sampling(temperature=1e6, seed=8, n=30, ignore_eos=True))
    assert {c.finish_reason for c in on} == {"length"}
    assert any(engine.tokenizer.eos in c.token_ids[:-1] for c in on)


def test_samples_follow_the_model(engine, prompts):
    """The first tokens of many samples have the mean log-probability that the model itself predicts."""
    n = 2000
    completions = engine.generate([prompts[3]], Sampling(max_tokens=1, n=n, seed=2))
    logprobs = torch.log_softmax(full_logits(prompts[3])[-1] + engine.drawing.forbidden, -1).double()
    expected, spread = entropy_and_spread(logprobs)
    mean = np.mean([c.logprobs[0] for c in completions])
    assert abs(mean - expected) < 4 * spread / n**0.5


def entropy_and_spread(logprobs: torch.Tensor) -> tuple[float, float]:
    probabilities, finite = logprobs.exp(), logprobs.nan_to_num(neginf=0)
    mean = (probabilities * finite).sum()
    return float(mean), float((probabilities * (finite - mean) ** 2).sum().sqrt())


def test_limits_and_reasons_to_finish(engine, prompts):
    eos = engine.tokenizer.eos
    for limit in (1, 5, None):
        for completion in engine.generate(prompts, Sampling(temperature=3.0, max_tokens=limit, n=4)):
            most = min(limit or CONTEXT, CONTEXT - len(completion.prompt_ids))
            assert len(completion.logprobs) == len(completion.token_ids)
            assert eos not in completion.token_ids[:-1]
            if completion.finish_reason == "stop":
                assert completion.token_ids[-1] == eos and len(completion.token_ids) <= most
            else:
                assert completion.finish_reason == "length" and len(completion.token_ids) == most
                assert completion.token_ids[-1] != eos


def test_the_context_can_be_filled_to_its_last_token(tokenizer):
    prompt = [tokenizer.bos, *range(CONTEXT - 2)]
    [completion] = endless(make_engine(tokenizer)).generate([prompt], Sampling(temperature=0))
    assert len(completion.token_ids) == 1 and completion.finish_reason == "length"


def test_neither_bos_nor_padding_is_ever_chosen(engine, prompts):
    """At a temperature that makes all tokens alike, 30,000 of which 62 in 384 would be padding."""
    completions = engine.generate(prompts[:1], Sampling(temperature=1e6, n=300, seed=1))
    chosen = np.concatenate([c.token_ids for c in completions])
    assert len(chosen) > 20_000
    assert chosen.max() == engine.tokenizer.eos < NUM_TOKENS == engine.tokenizer.eos + 1
    assert engine.tokenizer.bos not in chosen
    assert len(np.unique(chosen)) == NUM_TOKENS - 1


def test_progress_counts_every_sample_once(engine, prompts):
    counted = []
    engine.generate(prompts, Sampling(temperature=2.0, n=3), progress=counted.append)
    assert sum(counted) == 3 * len(prompts)


def test_what_a_completion_is_decoded_to(engine):
    codec, tokenizer = engine.codec, engine.tokenizer
    prompt = engine.prompt_ids()
    assert prompt[0] == tokenizer.bos and tokenizer.decode(prompt[1:]) == codec.head
    picture = np.random.default_rng(0).integers(0, 256, (32, 32, 3)).astype(np.uint8)
    stream = codec.encode(picture)
    half = engine.prompt_ids(stream, 0.5)
    assert tokenizer.decode(half[1:]) == codec.prompt(stream, 0.5)
    [completion] = engine.generate([prompt], Sampling(seed=3, max_tokens=10))
    assert completion.stream.startswith(codec.head)
    assert completion.stream == tokenizer.decode(
        [i for i in prompt[1:] + completion.token_ids if i != tokenizer.eos]
    )
    assert completion.media.size == (32, 32)


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([], "prompt 1 of 0 tokens: must have at least 1 token"),
        (
            [320] * CONTEXT,
            f"prompt 1 of {CONTEXT} tokens: must have .* at most {CONTEXT - 1} in the model's",
        ),
        ([320, NUM_TOKENS], f"prompt 1: token id {NUM_TOKENS}: must be an id from 0 to {NUM_TOKENS - 1}"),
        ([320, -1], "prompt 1: token id -1"),
    ],
)
def test_prompts_that_the_model_cannot_take(prompt, message, engine):
    with pytest.raises(UserError, match=message):
        engine.generate([[320, 1], prompt], Sampling(max_tokens=1))
