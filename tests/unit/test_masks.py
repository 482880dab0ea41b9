"""The engine under the grammar: every sample a valid file, whatever the model says and the settings are."""

import io
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from megatron_codec.codecs import JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.inference import Engine, EngineConfig, Sampling
from megatron_codec.inference.sampling import RowSettings, choose
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.vocabulary import ForeignIds
from tests.data_sources import photo_crops
from tests.llama import NUM_TOKENS, SMALL, small_model

CODEC = JpegCodec(image_size=32, quality=25, remove_head=True)
# Blurred, so that a whole picture fits into the context of the model.
STREAMS = [CODEC.encode(crop.resize((3, 3)).resize((32, 32))) for crop in photo_crops(12, 32)]


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    tokenizer = Tokenizer.train(STREAMS, 320, codec=CODEC.to_dict())
    assert tokenizer.num_tokens == NUM_TOKENS
    return tokenizer


def make_engine(tokenizer: Tokenizer, **config) -> Engine:
    module, layout = small_model()
    return Engine(module, SMALL, tokenizer, CODEC, layout, EngineConfig(**config))


@pytest.fixture(scope="module")
def engine(tokenizer) -> Engine:
    return make_engine(tokenizer)


@pytest.fixture(scope="module")
def prompts(engine) -> list[list[int]]:
    return [engine.prompt_ids(), *(engine.prompt_ids(s, r) for s in STREAMS[:3] for r in (0.25, 0.5, 0.75))]


SETTINGS = [
    {},
    {"temperature": 3.0},
    {"temperature": 0.0},
    {"top_k": 1},
    {"top_k": 40, "top_p": 0.9},
    {"min_p": 0.3},
    {"max_tokens": 60},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_every_sample_is_a_valid_picture(engine, prompts, settings):
    completions = engine.generate(prompts, Sampling(seed=1, n=2, **settings))
    for completion in completions:
        assert completion.finish_reason == "stop"
        report = CODEC.check(completion.stream)
        assert report.valid, report
        Image.open(io.BytesIO(CODEC.to_file(completion.stream))).load()
        assert len(completion.removed) == len(completion.token_ids)
        assert all(0 <= lost <= 1 for lost in completion.removed) and sum(completion.removed) > 0


def test_the_end_is_reached_in_the_fewest_tokens_there_can_be(engine, prompts):
    """The limit is the one that the grammar names; a token less, and the picture is cut as without it."""
    for prompt in prompts:
        cursor = engine.drawing.masks.begin(prompt)
        least = engine.drawing.masks.grammar.finish(cursor) + 1  # EOS
        for spare in (0, 1, 2, 7):
            [made] = engine.generate([prompt], Sampling(seed=spare, max_tokens=least + spare))
            assert made.finish_reason == "stop" and CODEC.check(made.stream).valid
    [cut] = engine.generate([prompts[0]], Sampling(max_tokens=5))
    assert cut.finish_reason == "length" and len(cut.token_ids) == 5


def test_samples_do_not_depend_on_the_company(engine, prompts):
    """With and without the grammar side by side."""
    each = [
        Sampling(seed=i, n=1 + i % 3, constrain=i % 2 == 0, max_tokens=90, top_k=i % 4 * 20)
        for i in range(len(prompts))
    ]
    together = engine.generate(prompts, each)
    alone = [c for p, s in zip(prompts, each, strict=True) for c in engine.generate([p], s)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    assert [c.removed for c in together] == [pytest.approx(c.removed, abs=1e-5) for c in alone]
    free = [
        c for c, i in zip(together, [i for i, s in enumerate(each) for _ in range(s.n)], strict=True) if i % 2
    ]
    assert free and not any(any(c.removed) for c in free)


def test_samples_that_make_room_stay_on_their_way(tokenizer, prompts):
    settings = Sampling(seed=3, n=3)
    wide = make_engine(tokenizer).generate(prompts[:3], settings)
    narrow = make_engine(tokenizer, cache_tokens=640).generate(prompts[:3], settings)
    assert [c.token_ids for c in wide] == [c.token_ids for c in narrow]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ([320, 255, 217], "prompt 0: byte 1 of its stream: cannot be part of a picture: FF in the data"),
        ([320, 0, 321], "token id 321: stands for no bytes"),
        ([0, 320], "token id 320: stands for no bytes"),
    ],
)
def test_prompts_that_begin_no_picture_are_refused(engine, prompt, message):
    with pytest.raises(UserError) as caught:
        engine.generate([prompt])
    assert message in str(caught.value)
    engine.generate([prompt], Sampling(constrain=False, max_tokens=2))
    engine.generate([prompt], Sampling(prompt_logprobs=True, max_tokens=0))  # nothing is sampled


def test_constrain_and_ignore_eos_exclude_each_other():
    assert not Sampling(ignore_eos=True).constrained and Sampling().constrained
    with pytest.raises(UserError, match="nothing can follow"):
        Sampling(constrain=True, ignore_eos=True)


def test_canonical_and_in_range_hold_for_samples(tokenizer):
    narrow = make_engine(tokenizer, canonical=True, in_range=True)
    strict = CODEC.format.scan(canonical=True, in_range=True)
    for completion in narrow.generate([narrow.prompt_ids()], Sampling(n=8, temperature=2.0)):
        assert strict.check(completion.stream) is None


@pytest.mark.parametrize(
    "settings", [{}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.2, "temperature": 1.5}], ids=str
)
def test_a_mask_leaves_the_probabilities_that_sampling_had_without_it(settings):
    """Rejection sampling, the plain way, is the oracle: draw without the mask until a token is allowed."""
    generator = torch.Generator().manual_seed(0)
    logprobs = torch.log_softmax(torch.randn(1, 12, generator=generator) * 2, -1)
    allowed = torch.rand(1, 12, generator=generator) < 0.6
    draws = 20_000
    rows = RowSettings([Sampling(**settings)] * draws, logprobs.device)
    uniform = torch.rand(draws, 2, generator=generator, dtype=torch.float64)
    free = choose(logprobs.expand(draws, -1), rows, uniform).tokens.tolist()
    kept = [token for token in free if allowed[0, token]]
    made = choose(logprobs.expand(draws, -1), rows, uniform, allowed.expand(draws, -1))
    tokens, removed, redrawn = made
    assert removed is not None and redrawn is not None
    assert allowed[0, tokens].all()
    assert [a == b for a, b in zip(tokens.tolist(), free, strict=True)] == (~redrawn).tolist()
    assert removed[0] == pytest.approx(1 - len(kept) / len(free), abs=0.02)
    expected, found = Counter(kept), Counter(tokens.tolist())
    for token in range(12):
        assert found[token] / draws == pytest.approx(expected[token] / len(kept), abs=0.025)


def test_where_the_settings_keep_no_allowed_token_they_are_applied_to_the_allowed_ones():
    logprobs = torch.log(torch.tensor([[0.6, 0.3, 0.07, 0.03]]))
    allowed = torch.tensor([[False, False, True, True]])
    for settings in ({"top_k": 1}, {"top_p": 0.5}, {"temperature": 0.0}):
        rows = RowSettings([Sampling(**settings)], logprobs.device)
        random = torch.tensor([[0.1, 0.99]], dtype=torch.float64)
        tokens, removed, redrawn = choose(logprobs, rows, random, allowed)
        assert removed is not None and redrawn is not None
        assert tokens.tolist() == [2] and removed.tolist() == [1.0] and redrawn.tolist() == [True]


def test_a_sample_that_was_valid_without_the_grammar_stays_as_it_was(tokenizer):
    """And of no other sample nothing was redrawn. The model is one that is mostly right."""
    engine = make_engine(tokenizer)
    engine.decoder.forward = recites([tokenizer.encode_to_list(stream) for stream in STREAMS[:8]], engine)
    prompt = engine.prompt_ids()
    free = engine.generate([prompt], Sampling(n=200, constrain=False, seed=1))
    held = engine.generate([prompt], Sampling(n=200, seed=1))
    valid = [c.finish_reason == "stop" and CODEC.check(c.stream).valid for c in free]
    assert 40 < sum(valid) < 160
    for was_valid, without, within in zip(valid, free, held, strict=True):
        assert within.finish_reason == "stop" and CODEC.check(within.stream).valid
        assert was_valid == (within.redrawn == 0) == (within.token_ids == without.token_ids)


def test_a_vocabulary_from_elsewhere(tokenizer):
    """With ids in another order, BOS and EOS among them, some that stand for nothing, and a dummy prefix."""
    order = np.random.default_rng(0).permutation(322)
    ids = ForeignIds(tuple(order[:318].tolist()), *order[318:320].tolist(), 322, (int(order[320]),))
    other = Tokenizer(tokenizer.merges[:62], CODEC.to_dict(), ids=ids)
    engine = make_engine(other)
    prompts = [engine.prompt_ids(), engine.prompt_ids(STREAMS[0], 0.5)]
    assert prompts[1][:2] == [other.bos, *other.prefix]
    for completion in engine.generate(prompts, Sampling(n=3, temperature=1.5)):
        assert completion.finish_reason == "stop" and completion.redrawn
        assert CODEC.check(completion.stream).valid
        assert not {*other.prefix, *other.unused, other.bos} & set(completion.token_ids)


def recites(streams: list[list[int]], engine: Engine):
    """The forward pass of a model that goes on as a stream which has the same token in the same place does,
    and errs now and then."""
    eos, width, errs = engine.tokenizer.eos, len(engine.drawing.forbidden), 0.01

    def forward(step):
        rows = torch.full((len(step.wanted), width), errs / width)
        for row, at in enumerate(step.wanted):
            place, token = step.positions[at], step.tokens[at]  # BOS is in place 0
            next = [
                [*s, eos][place] for s in streams if place <= len(s) and (place == 0 or s[place - 1] == token)
            ]
            for id in next:
                rows[row, id] += (1 - errs) / len(next)
        return rows.log()

    return forward
