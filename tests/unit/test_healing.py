"""Prompts that are cut from streams, whose last tokens the engine draws again."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from megatron_codec.codecs import AvcCodec, JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.inference import Completion, Engine, EngineConfig, Sampling
from megatron_codec.inference.healing import heal
from megatron_codec.inference.masks import Masks
from megatron_codec.tokenizer import Tokenizer
from megatron_codec.tokenizer.vocabulary import ForeignIds
from tests.data_sources import VIDEOS, photo_crops, real_video
from tests.llama import SMALL, small_model
from tests.videos import moving

CLIPS = AvcCodec(frames=3, width=32, height=32)
PICTURES = JpegCodec(image_size=32, quality=25)
HEALED = {"heal_prompt": True, "temperature": 1.5, "seed": 5}


@cache
def streams_of(codec: AvcCodec | JpegCodec) -> tuple[bytes, ...]:
    if isinstance(codec, JpegCodec):
        return tuple(codec.encode(crop.resize((3, 3)).resize((32, 32))) for crop in photo_crops(12, 32))
    frames = moving(24, 32, 32)
    frames[:, 16:] = frames[:1, 16:]
    return tuple(codec.encode(frames[start : start + 3]) for start in range(22))


def make_engine(codec: AvcCodec | JpegCodec, **config) -> Engine:
    module, layout = small_model()
    # Of what lies around the cuts of prompts, so that there are many tokens that span them.
    around = [
        stream[max(0, cut - 9) : cut + 9]
        for stream in streams_of(codec)
        for cut in (len(codec.prompt(stream, part / 12)) for part in range(12))
    ]
    tokenizer = Tokenizer.train(around, 320, codec=codec.to_dict(), drop_duplicates=True)
    shape = replace(SMALL, seq_length=1024)
    return Engine(module, shape, tokenizer, codec, layout, EngineConfig(**{"cache_tokens": 8192} | config))


@pytest.fixture(scope="module")
def engine() -> Engine:
    return make_engine(CLIPS)


@pytest.fixture(scope="module")
def prompts(engine) -> list[list[int]]:
    return [engine.prompt_ids(), *(prompt_of(engine, s, n) for s in streams_of(CLIPS)[::6] for n in (1, 2))]


def prompt_of(engine: Engine, stream: bytes, frames: int) -> list[int]:
    return engine.prompt_ids(stream, frames / 3)


def spelled(engine: Engine, made: Completion, given: bytes) -> int:
    """How many of the new tokens spell the prompt, the one that goes beyond included.

    An AssertionError unless they are those of an encoding that begins with what is given.
    """
    tokenizer = engine.tokenizer
    ids, count = list(made.prompt_ids), 0
    while len(tokenizer.decode(ids)) < len(given):
        ids.append(made.token_ids[count])
        count += 1
    text = tokenizer.decode(ids)
    assert text.startswith(given) and made.stream.startswith(given)
    assert [tokenizer.bos, *tokenizer.encode(text).tolist()] == ids
    return count


def oracle(engine: Engine, stream: bytes, monkeypatch) -> list[int]:
    """Gives the engine a model that knows a stream; returns the stream's ids, between BOS and EOS."""
    whole = [engine.tokenizer.bos, *engine.tokenizer.encode(stream).tolist(), engine.tokenizer.eos]
    original = Engine._sample

    def knowing(self, samples, logits):
        known = torch.zeros_like(logits)
        for row, sample in enumerate(samples):
            if sample.tokens == whole[: len(sample.tokens)]:
                known[row, whole[len(sample.tokens)]] = 50
        original(self, samples, known)

    monkeypatch.setattr(Engine, "_sample", knowing)
    return whole


@pytest.mark.parametrize("constrain", [False, True])
@pytest.mark.parametrize("codec", [CLIPS, PICTURES], ids=lambda codec: codec.name)
def test_a_model_that_knows_the_stream_writes_its_very_tokens(codec, constrain, monkeypatch):
    engine = make_engine(codec)
    changed = 0
    for stream in streams_of(codec)[::6]:
        with monkeypatch.context() as patch:
            whole = oracle(engine, stream, patch)
            for part in range(5):
                prompt = engine.prompt_ids(stream, part / 4)
                [made] = engine.generate([prompt], Sampling(heal_prompt=True, constrain=constrain))
                assert made.prompt_ids + made.token_ids == whole
                assert made.finish_reason == "stop" and made.redrawn == 0
                assert len(made.removed) == len(made.logprobs) == len(made.token_ids)
                changed += prompt != whole[: len(prompt)]
    assert changed or codec is PICTURES


@pytest.mark.parametrize("constrain", [False, True])
def test_real_clips_go_on_among_the_choices(constrain):
    """With 1024 entries, from every number of frames, and under the tightest budget there is."""
    codec = AvcCodec(width=64, height=48)
    streams = [codec.encode(real_video(name), pad_short=True) for name in VIDEOS]
    tokenizer = Tokenizer.train(streams, 1024, codec=codec.to_dict())
    masks = Masks(codec, tokenizer, 1152, torch.device("cpu")) if constrain else None
    healed = 0
    for stream in streams:
        whole = [tokenizer.bos, *tokenizer.encode(stream).tolist()]
        for frames in range(codec.frames + 1):
            given = codec.first_frames(stream, frames)
            prompt = [tokenizer.bos, *tokenizer.encode(given).tolist()]
            left = len(stream) - len(given) + 1  # a token a byte, and EOS
            healing = heal(prompt, tokenizer, masks, left, len(prompt) + left)
            place = start = len(prompt) if healing is None else len(healing.certain)
            while healing and (choice := healing.choice(whole[start:place])) is not None:
                assert whole[place] in choice.allowed and set(choice.allowed) <= set(choice.agreeing)
                place += 1
            assert tokenizer.decode(whole[:place]).startswith(given)
            healed += healing is not None
    assert healed > 20


@pytest.mark.parametrize("settings", [{}, {"constrain": False}, {"temperature": 0.0}, {"top_k": 3}], ids=str)
def test_samples_begin_with_what_is_given(engine, settings):
    again = set()
    for stream in streams_of(CLIPS)[::7]:
        for frames in range(4):
            prompt = prompt_of(engine, stream, frames)
            given = CLIPS.first_frames(stream, frames)
            for sample in engine.generate([prompt], Sampling(**HEALED | settings, n=3, max_tokens=20)):
                assert sample.prompt_ids == prompt[: len(sample.prompt_ids)]
                again.add(spelled(engine, sample, given))
    assert max(again) > 0


def test_all_ways_are_taken(engine, prompts):
    """A random model writes the prompt's own tokens in some samples and longer ones in others."""
    made = engine.generate(prompts, Sampling(**HEALED, n=40, max_tokens=2, constrain=False))
    own = [sample.prompt_ids + sample.token_ids for sample in made]
    assert any(ids[: len(p)] == p for p in prompts for ids in own)
    for number, prompt in enumerate(prompts):
        assert any(ids[: len(prompt)] != prompt for ids in own[40 * number : 40 * (number + 1)])


def test_samples_do_not_depend_on_the_company(engine, prompts):
    each = [
        Sampling(
            **HEALED | {"heal_prompt": number % 4 != 3, "seed": number},
            n=1 + number % 3,
            constrain=number % 2 == 0,
            max_tokens=60,
            top_k=number % 3 * 30,
        )
        for number in range(len(prompts))
    ]
    together = engine.generate(prompts, each)
    alone = [c for p, s in zip(prompts, each, strict=True) for c in engine.generate([p], s)]
    assert [c.token_ids for c in together] == [c.token_ids for c in alone]
    for config in (
        {"prefill_chunk_size": 5, "max_batch_size": 3},
        {"cache_tokens": 1024},  # samples have to make room for each other
    ):
        again = make_engine(CLIPS, **config).generate(prompts, each)
        assert [c.token_ids for c in again] == [c.token_ids for c in together], config
    for one, other in zip(together, alone, strict=True):
        assert one.logprobs == pytest.approx(other.logprobs, abs=2e-5)
        assert one.removed == pytest.approx(other.removed, abs=1e-5)


def test_samples_that_the_grammar_leaves_alone_are_those_without_it():
    alike = 0
    for codec in (CLIPS, PICTURES):
        engine = make_engine(codec)
        prompts = [prompt_of(engine, stream, part) for stream in streams_of(codec)[::6] for part in range(3)]
        settings = {"heal_prompt": True, "seed": 1, "n": 20, "max_tokens": 1, "temperature": 0.7}
        guided = engine.generate(prompts, Sampling(**settings))
        free = engine.generate(prompts, Sampling(**settings, constrain=False))
        for one, other in zip(guided, free, strict=True):
            assert one.redrawn or one.token_ids == other.token_ids
            assert not other.redrawn and sum(other.removed) == 0
            alike += one.redrawn == 0
    assert alike > 50


def test_events_come_token_by_token(engine, prompts):
    events = []
    request = engine.request(prompts[1], Sampling(**HEALED, n=2, max_tokens=30), events.extend)
    engine.add(request)
    while engine.busy:
        engine.step()
    made = engine.generate(prompts[1:2], Sampling(**HEALED, n=2, max_tokens=30))
    assert list(request.prompt) == made[0].prompt_ids != prompts[1]
    for number, sample in enumerate(made):
        assert [id for e in events if e.sample == number for id in e.token_ids] == sample.token_ids
    assert all(len(event.token_ids) <= 1 for event in events)


@pytest.mark.parametrize("constrain", [False, True])
def test_max_tokens_counts_what_goes_beyond_the_prompt(engine, constrain):
    stream = streams_of(CLIPS)[0]
    for frames in range(3):
        given, prompt = CLIPS.first_frames(stream, frames), prompt_of(engine, stream, frames)
        settings = Sampling(**HEALED, n=8, max_tokens=3, constrain=constrain, ignore_eos=not constrain)
        for made in engine.generate([prompt], settings):
            count = spelled(engine, made, given)
            exactly = len(engine.tokenizer.decode(made.prompt_ids + made.token_ids[:count])) == len(given)
            assert len(made.token_ids) == count + (3 if exactly else 2)
            assert made.finish_reason == "length"


@pytest.mark.parametrize("codec", [CLIPS, PICTURES], ids=lambda codec: codec.name)
def test_a_limit_that_is_enough_for_the_prompt_by_itself_cuts_nothing(codec):
    engine = make_engine(codec)
    for stream in streams_of(codec)[::14]:
        for part in range(3):
            prompt = prompt_of(engine, stream, part)
            least = engine.drawing.masks.grammar.finish(engine.drawing.masks.begin(prompt)) + 1  # EOS
            for spare in (0, 1, 2, 5, 9):
                made = engine.generate([prompt], Sampling(**HEALED, n=3, max_tokens=least + spare))
                assert all(c.finish_reason == "stop" and codec.check(c.stream).valid for c in made)


def test_tokens_of_the_prompt_do_not_stop_a_sample(engine, prompts):
    tokenizer = engine.tokenizer
    settings = Sampling(**HEALED, stop_token_ids=tuple(range(tokenizer.num_tokens)), constrain=False)
    for prompt, made in zip(prompts, engine.generate(prompts, settings), strict=True):
        given = tokenizer.decode(prompt)
        assert made.finish_reason == "stop" and made.stream.startswith(given)
        # only the last one goes beyond
        assert given.startswith(tokenizer.decode(made.prompt_ids + made.token_ids[:-1]))


def test_other_prompts_are_taken_as_they_are(engine, prompts):
    """Ids that no stream has, without BOS, or of which nothing is open; and scoring."""
    tokenizer = engine.tokenizer
    apart = [tokenizer.bos, *tokenizer.decode(prompts[1])]  # a token a byte
    for prompt in (apart, prompts[1][1:], [tokenizer.bos], [*prompts[1], tokenizer.eos, 3]):
        assert heal(prompt, tokenizer, None, None, 1024) is None
        settings = {"seed": 2, "max_tokens": 20, "constrain": False}
        [healed] = engine.generate([prompt], Sampling(**settings, heal_prompt=True))
        [plain] = engine.generate([prompt], Sampling(**settings))
        assert healed.prompt_ids == prompt and healed.token_ids == plain.token_ids
    [scored] = engine.generate(
        prompts[1:2], Sampling(heal_prompt=True, max_tokens=0, prompt_logprobs=True, constrain=False)
    )
    assert scored.prompt_ids == prompts[1] and len(scored.prompt_logprobs) == len(prompts[1]) - 1


def test_prompts_that_begin_no_clip_are_refused_as_without_healing(engine):
    stream = streams_of(CLIPS)[0]
    given = CLIPS.first_frames(stream, 2)
    for cut in range(1, 12):
        wrong = given[:-cut] + bytes([given[-cut] ^ 0x55]) + given[len(given) - cut + 1 :]
        prompt = [engine.tokenizer.bos, *engine.tokenizer.encode(wrong).tolist()]
        messages = []
        for healed in (False, True):
            try:
                engine.request(prompt, Sampling(heal_prompt=healed), print)
                messages.append("")
            except UserError as error:
                messages.append(str(error))
        assert messages[0] == messages[1]


def test_foreign_vocabularies():
    """Ids of their own and a prefix, under the grammar."""
    engine = make_engine(CLIPS)
    plain = engine.tokenizer
    ids = [(7 * id + 3) % 320 for id in range(317)]
    merges = plain.merges[:61]
    left = sorted({*range(320)} - {*ids})
    tokenizer = Tokenizer(
        merges, codec=CLIPS.to_dict(), ids=ForeignIds(tuple(ids), left[0], left[1], 322, (left[2],))
    )
    module, layout = small_model()
    engine = Engine(module, replace(SMALL, seq_length=1024), tokenizer, CLIPS, layout)
    for stream in streams_of(CLIPS)[::9]:
        for frames in range(3):
            prompt = prompt_of(engine, stream, frames)
            for made in engine.generate([prompt], Sampling(**HEALED, n=4, max_tokens=20)):
                assert made.stream.startswith(CLIPS.first_frames(stream, frames))
                spelled(engine, made, CLIPS.first_frames(stream, frames))
