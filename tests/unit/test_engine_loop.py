"""The engine behind its loop: requests from many threads, cancelled, refused, and failing."""

import threading
import time

import pytest
import torch

from megatron_codec.errors import UserError
from megatron_codec.inference import Engine, EngineConfig
from megatron_codec.inference.loop import EngineLoop, Overloaded, Stopped
from megatron_codec.tokenizer import Tokenizer
from tests.llama import SMALL, small_model
from tests.tiny import CODEC
from tests.unconstrained import Sampling


@pytest.fixture
def engine() -> Engine:
    tokenizer = Tokenizer([(i, i + 1) for i in range(64)], codec=CODEC.to_dict())
    module, layout = small_model()
    return Engine(module, SMALL, tokenizer, CODEC, layout, EngineConfig(max_batch_size=6, cache_tokens=2048))


@pytest.fixture
def loop(engine):
    loop = EngineLoop(engine, max_requests=64)
    yield loop
    loop.stop()


class Receiver:
    """Gathers a request's events."""

    def __init__(self, n: int = 1):
        self.tokens: list[list[int]] = [[] for _ in range(n)]
        self.reasons: list[str | None] = [None] * n
        self.began = threading.Event()

    def __call__(self, events) -> None:
        for event in events:
            assert self.reasons[event.sample] is None, "an event after the end"
            assert len(event.token_ids) == len(event.logprobs)
            self.tokens[event.sample] += event.token_ids
            self.reasons[event.sample] = event.finish_reason
        self.began.set()


def prompt_of(number: int) -> list[int]:
    return [320, *((number * 37 + i * i) % 256 for i in range(number % 50))]


def test_requests_of_many_threads_get_what_they_get_alone(engine, loop):
    receivers = {number: Receiver(1 + number % 3) for number in range(24)}
    settings = {
        number: Sampling(temperature=0.5 + number % 4, seed=number, n=1 + number % 3, top_k=number % 7 * 30)
        for number in receivers
    }

    def ask(numbers):
        for number in numbers:
            request = loop.submit(prompt_of(number), settings[number], receivers[number])
            if number % 2:
                assert request.finished.wait(60)

    threads = [threading.Thread(target=ask, args=(range(i, 24, 8),)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    statistics = at_rest(loop)
    assert statistics.cache_used == 0 and statistics.cache_total == 2048
    assert sum(statistics.finished.values()) == sum(1 + number % 3 for number in range(24))
    assert statistics.generated_tokens == sum(len(t) for r in receivers.values() for t in r.tokens)
    assert loop.stop()
    with pytest.raises(Stopped, match="shutting down"):
        loop.submit([320], Sampling(), Receiver())
    for number, receiver in receivers.items():
        alone = engine.generate([prompt_of(number)], settings[number])
        assert [c.token_ids for c in alone] == receiver.tokens, number
        assert [c.finish_reason for c in alone] == receiver.reasons


def at_rest(loop):
    """The statistics, when everything has ended."""
    deadline = time.monotonic() + 60
    while (found := loop.statistics()).running or found.waiting or found.cache_used:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return found


def slowly(engine, monkeypatch, seconds: float = 0.01) -> None:
    original = Engine.step

    def step(self):
        time.sleep(seconds)
        original(self)

    monkeypatch.setattr(Engine, "step", step)
    engine.drawing.forbidden[engine.tokenizer.eos] = -torch.inf


def test_a_cancelled_request_ends_at_once_and_the_others_go_on(engine, loop, monkeypatch):
    slowly(engine, monkeypatch)
    left, kept = Receiver(4), Receiver()
    cancelled = loop.submit([320, 1], Sampling(n=4), left)
    other = loop.submit([320, 2], Sampling(max_tokens=40), kept)
    assert left.began.wait(10)
    loop.cancel(cancelled)
    assert cancelled.finished.wait(5)
    assert left.reasons == ["cancelled"] * 4 and max(map(len, left.tokens)) < 100
    assert other.finished.wait(20)
    assert kept.reasons == ["length"] and len(kept.tokens[0]) == 40
    loop.cancel(cancelled)  # again, and nothing happens
    assert at_rest(loop).finished == {"cancelled": 4, "length": 1}


def test_one_of_a_request_s_samples_is_cancelled(engine, loop, monkeypatch):
    slowly(engine, monkeypatch)
    receiver = Receiver(4)
    request = loop.submit([320, 1], Sampling(n=4, max_tokens=60), receiver)
    assert receiver.began.wait(10)
    loop.cancel(request, [1, 3])
    assert request.finished.wait(20)
    assert receiver.reasons == ["length", "cancelled", "length", "cancelled"]
    assert [len(tokens) == 60 for tokens in receiver.tokens] == [True, False, True, False]
    assert at_rest(loop).cache_used == 0


def test_more_requests_than_may_be_open_are_refused(engine, monkeypatch):
    slowly(engine, monkeypatch)
    loop = EngineLoop(engine, max_requests=3)
    for _ in range(3):
        loop.submit([320], Sampling(), Receiver())
    with pytest.raises(Overloaded, match="3 open requests"):
        loop.submit([320], Sampling(), Receiver())
    started = time.monotonic()
    assert loop.stop(grace=0)
    assert time.monotonic() - started < 5


def test_stopping_lets_open_requests_finish_within_the_grace(engine, monkeypatch):
    slowly(engine, monkeypatch, 0.03)
    loop = EngineLoop(engine)
    short, long = Receiver(), Receiver()
    loop.submit([320], Sampling(max_tokens=5), short)
    loop.submit([320, 5], Sampling(), long)
    assert loop.stop(grace=2)
    assert short.reasons == ["length"] and len(short.tokens[0]) == 5
    assert long.reasons == ["cancelled"]


def test_the_grace_can_be_cut_short(engine, monkeypatch):
    slowly(engine, monkeypatch, 0.1)
    loop = EngineLoop(engine)
    long = Receiver()
    loop.submit([320, 5], Sampling(), long)
    assert long.began.wait(10)
    started = time.monotonic()
    stopping = threading.Thread(target=loop.stop, args=(600,))
    stopping.start()
    time.sleep(0.3)
    assert stopping.is_alive()
    loop.hurry()
    stopping.join(30)
    assert not stopping.is_alive() and time.monotonic() - started < 30
    assert long.reasons == ["cancelled"]


def test_an_engine_that_fails_tells_everybody(engine, monkeypatch):
    slowly(engine, monkeypatch)
    loop = EngineLoop(engine)
    receivers = [Receiver(2) for _ in range(3)]
    requests = [loop.submit([320, i], Sampling(n=2), r) for i, r in enumerate(receivers)]
    assert receivers[0].began.wait(10)
    assert loop.healthy

    def broken(*_):
        raise RuntimeError("a process has died")

    monkeypatch.setattr(engine.decoder, "forward", broken)
    for request, receiver in zip(requests, receivers, strict=True):
        assert request.finished.wait(5)
        assert receiver.reasons == ["error"] * 2
        assert "a process has died" in str(request.error)
    assert not loop.healthy and "a process has died" in str(loop.failure)
    with pytest.raises(Stopped, match="a process has died"):
        loop.submit([320], Sampling(), Receiver())
    assert not loop.stop()


def test_a_receiver_that_fails_harms_nobody_else(engine, loop, monkeypatch):
    slowly(engine, monkeypatch, 0)

    def broken(events):
        raise ValueError("the client has gone")

    kept = Receiver()
    first = loop.submit([320], Sampling(n=3), broken)
    second = loop.submit([320, 3], Sampling(max_tokens=30), kept)
    assert first.finished.wait(10) and second.finished.wait(10)
    assert kept.reasons == ["length"] and loop.healthy


@pytest.mark.parametrize(
    ("prompt", "sampling", "message"),
    [
        ([320, 400], {}, "prompt: token id 400"),
        ([], {}, "prompt of 0 tokens"),
        ([320], {"max_tokens": 128}, "max_tokens 128 after a prompt of 1 tokens"),
        ([320], {"stop_token_ids": (999,)}, "stop_token_ids: token id 999"),
        ([320], {"logprobs": 400}, "logprobs 400"),
    ],
)
def test_what_cannot_be_served_is_refused_at_once(prompt, sampling, message, loop):
    with pytest.raises(UserError, match=message):
        loop.submit(prompt, Sampling(**sampling), Receiver())
    assert loop.statistics().waiting == 0
