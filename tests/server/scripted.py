"""A double of `EngineLoop`: its own thread, tokens that are a function of seed and prompt, and no model.

A prompt that is the beginning of one of its pictures is continued to the end of such a picture; every other
prompt by random bytes. So answers can be compared with `script`, which is what "the engine alone" gives.
"""

import hashlib
import itertools
import random
import threading
import time
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

from megatron_codec.codecs import Codec, JpegCodec
from megatron_codec.errors import UserError
from megatron_codec.inference.loop import Overloaded, Stopped
from megatron_codec.inference.requests import Event, Request, Statistics
from megatron_codec.inference.sampling import Sampling
from megatron_codec.tokenizer import Tokenizer
from tests.data_sources import photo_crops

CODEC = JpegCodec(image_size=32, quality=25)
STREAMS = [CODEC.encode(crop) for crop in photo_crops(8, 32)]
TOKENIZER = Tokenizer.train(STREAMS, 300, codec=CODEC.to_dict())
CONTEXT = 400


@dataclass(frozen=True)
class Material:
    """What the double knows: the streams that it writes."""

    codec: Codec
    streams: list[bytes]
    tokenizer: Tokenizer
    context: int


PICTURES = Material(CODEC, STREAMS, TOKENIZER, CONTEXT)


class ScriptedEngine:
    """What the server asks of `Engine`."""

    def __init__(self, material: Material):
        self.codec, self.tokenizer, self.material = material.codec, material.tokenizer, material
        self.config = SimpleNamespace(seq_length=material.context)
        self.memory = "no memory"

    def prompt_ids(self, stream=None, ratio=0.0):
        start = self.codec.preamble if stream is None else self.codec.prompt(stream, ratio)
        return [self.tokenizer.bos, *self.tokenizer.encode_to_list(start)]

    def request(self, prompt, sampling, deliver):
        unknown = [i for i in prompt if not 0 <= i < self.tokenizer.num_tokens]
        if unknown:
            raise UserError(f"prompt with id {unknown[0]}", f"has ids below {self.tokenizer.num_tokens}")
        context = self.material.context
        if not 0 < len(prompt) < context:
            raise UserError(f"prompt of {len(prompt)} tokens", f"must have 1 to {context - 1}")
        wrong = [i for i in sampling.stop_token_ids if not 0 <= i < self.tokenizer.num_tokens]
        if wrong:
            raise UserError(f"stop_token_ids {wrong[0]}", "is no token")
        return Request(tuple(prompt), sampling, deliver)


def script(prompt, sampling: Sampling, sample: int, material: Material = PICTURES) -> tuple[list[int], str]:
    """Tokens and finish reason of one sample."""
    tokenizer = material.tokenizer
    key = hashlib.sha256(repr((tuple(prompt), sampling.seed, sample)).encode()).digest()
    rng = random.Random(key)
    ids = list(prompt)[1:] if prompt[:1] == (tokenizer.bos,) else list(prompt)
    start = tokenizer.decode([i for i in ids if i < tokenizer.vocab_size])
    same = [stream for stream in material.streams if start and stream.startswith(start)]
    if same:
        new = [*tokenizer.encode_to_list(rng.choice(same)[len(start) :]), tokenizer.eos]
    else:
        new = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(1, 60))] + [tokenizer.eos]
    limit = material.context - len(prompt)
    if sampling.max_tokens is not None:
        limit = min(limit, sampling.max_tokens)
    ends = {tokenizer.eos, *sampling.stop_token_ids} - ({tokenizer.eos} if sampling.ignore_eos else set())
    stop = next((place for place, id in enumerate(new) if id in ends), None)
    if stop is not None and stop < limit:
        return new[: stop + 1], "stop"
    new += [rng.randrange(tokenizer.vocab_size) for _ in range(limit - len(new))]
    return new[:limit], "length"


def logprob(id: int) -> float:
    return -id / 100


class ScriptedLoop:
    """The interface of `EngineLoop`. `token_seconds` is the time of a step; `fail` breaks it."""

    def __init__(self, token_seconds=0.0, max_requests=1024, material=PICTURES):
        self.engine, self.token_seconds = ScriptedEngine(material), token_seconds
        self.max_requests = max_requests
        self.failure = None
        self.cancelled: list[tuple[Request, list[int] | None]] = []
        self._open: dict[int, tuple[Request, list]] = {}
        self._news = threading.Condition()
        self._closing, self._deadline = False, float("inf")
        self._counts: Counter = Counter()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def healthy(self):
        return self.failure is None and self._thread.is_alive()

    @property
    def open_requests(self):
        return len(self._open)

    def submit(self, prompt, sampling, deliver):
        return self.take(self.engine.request(prompt, sampling, deliver))

    def take(self, request):
        prompt, sampling = request.prompt, request.sampling
        with self._news:
            if self._closing or not self.healthy:
                raise Stopped("the engine", "is shutting down")
            if len(self._open) >= self.max_requests:
                raise Overloaded(f"{len(self._open)} open requests", "are as many as are taken", "try later")
            material = self.engine.material
            scripts = [script(request.prompt, sampling, sample, material) for sample in range(sampling.n)]
            self._open[request.number] = (request, [[tokens, reason, 0] for tokens, reason in scripts])
            self._counts["prompt_tokens"] += len(prompt)
            self._news.notify()
        return request

    def cancel(self, request, samples=None):
        with self._news:
            if request.number in self._open:
                self.cancelled.append((request, samples))
                self._news.notify()

    def statistics(self):
        with self._news:
            counts = replace(Statistics(cache_total=10_000), **self._counts)
            return replace(counts, running=len(self._open))

    def fail(self, error):
        with self._news:
            self.failure = error
            left = [request for request, _ in self._open.values()]
            self._open.clear()
            self._news.notify()
        for request in left:
            request.fail(error)

    def stop(self, grace=0):
        with self._news:
            self._closing, self._deadline = True, time.monotonic() + grace
            self._news.notify()
        self._thread.join()
        return self.failure is None

    def _run(self):
        while self.failure is None:
            with self._news:
                if not (self._open or self._closing):
                    self._news.wait(0.5)
                if self._closing and (not self._open or time.monotonic() > self._deadline):
                    left = [request for request, _ in self._open.values()]
                    self._open.clear()
                    for request in left:
                        self._end(request, "cancelled")
                    return
                for request, numbers in self.cancelled:
                    if request.number not in self._open:
                        continue
                    states = self._open[request.number][1]
                    for number in range(len(states)) if numbers is None else numbers:
                        states[number][2] = None
                    if all(state[2] is None for state in states):
                        del self._open[request.number]
                        self._end(request, "cancelled")
                    else:
                        request.deliver([Event(n, finish_reason="cancelled") for n in numbers or ()])
                self.cancelled.clear()
                going = list(self._open.values())
            for request, samples in going:
                events = list(itertools.chain.from_iterable(self._step(request, samples)))
                if all(state[2] is None for state in samples):
                    with self._news:
                        if self._open.pop(request.number, None) is None:
                            continue
                        request.finished.set()
                request.deliver(events)
            if self.token_seconds:
                time.sleep(self.token_seconds)

    def _end(self, request, reason):
        request.finished.set()
        request.deliver([Event(sample, finish_reason=reason) for sample in range(request.sampling.n)])

    def _step(self, request, samples):
        sampling = request.sampling
        if sampling.prompt_logprobs and not request.prompt_logprobs:
            request.prompt_logprobs = [None, *map(logprob, request.prompt[1:])]
            top = {0: 0.0, 1: float("-inf")} if sampling.logprobs else {}
            request.prompt_top_logprobs = [{}, *[top] * (len(request.prompt) - 1)]
        for number, state in enumerate(samples):
            tokens, reason, place = state
            if place is None:
                continue
            new = tuple(tokens[place : place + 1])
            last = place + 1 >= len(tokens)
            state[2] = None if last else place + 1
            self._counts["generated_tokens"] += len(new)
            top = tuple({id: logprob(id), (id + 1) % 256: -50.0} for id in new) if sampling.logprobs else ()
            end = reason if last else None
            yield [
                Event(number, new, tuple(map(logprob, new)), top, tuple(0.25 for _ in new), place % 2, end)
            ]
