"""What one HTTP request asked the engine for, as asyncio sees it.

Events come on the engine's thread, in a batch for each request and step. They are put into one mailbox and
taken out on the server's thread, which is woken once for all of them, and only if somebody waits for tokens
as they come: the engine needs the interpreter's lock more.
"""

import asyncio
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

from megatron_codec.inference.engine import Engine
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.inference.requests import Event, Request
from megatron_codec.inference.sampling import Sampling
from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.text import Vocabulary


@dataclass(frozen=True)
class Stops:
    """Where samples end and what is shown of their ends.

    Args:
        strings: bytes that end a sample; neither they nor what follows is shown.
        eos: id of the token that ends a picture.
        show: show the string or the token that ended a sample too.
    """

    strings: tuple[bytes, ...] = ()
    eos: int = -1
    show: bool = False


@dataclass(eq=False)
class Sample:
    """One continuation.

    Attributes:
        index: among the samples of its generation, those of the first prompt first.
        prompt: which prompt it continues.
        data: the bytes so far, without what `Stops` cuts off.
        released: how many of them no later byte can take back.
        finish_reason: `stop`, `length` or `cancelled`; None while it goes on.
        stop_reason: the stop string or the id of the token that ended it; None at EOS.
    """

    index: int
    prompt: int
    stops: Stops
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    top_logprobs: list[dict[int, float]] = field(default_factory=list)
    removed: list[float] = field(default_factory=list)
    redrawn: int = 0
    data: bytearray = field(default_factory=bytearray)
    released: int = 0
    finish_reason: str | None = None
    stop_reason: bytes | int | None = None

    def take(self, event: Event, vocabulary: Vocabulary) -> None:
        """Adds what a step brought. What comes after its end is dropped."""
        for place, token in enumerate(event.token_ids):
            if self.finish_reason is not None:
                return
            self.token_ids.append(token)
            self.logprobs.append(event.logprobs[place] if event.logprobs else 0.0)
            self.removed.append(event.removed[place] if event.removed else 0.0)
            if event.top_logprobs:
                self.top_logprobs.append(event.top_logprobs[place])
            last = event.finish_reason == "stop" and place == len(event.token_ids) - 1
            if last and token != self.stops.eos:
                self.stop_reason = token
            if not last or self.stops.show:
                self._extend(vocabulary.data[token])
        self.redrawn += event.redrawn
        if self.finish_reason is None:
            self.finish_reason = event.finish_reason
        if self.finish_reason is not None:
            self.released = len(self.data)

    def _extend(self, data: bytes) -> None:
        longest = max((len(string) for string in self.stops.strings), default=0)
        start = max(0, len(self.data) - longest + 1)
        self.data += data
        found = [(place, s) for s in self.stops.strings if (place := self.data.find(s, start)) >= 0]
        if found:
            place, self.stop_reason = min(found)
            del self.data[place + (len(self.stop_reason) if self.stops.show else 0) :]
            self.finish_reason = "stop"
            return
        self.released = len(self.data)
        for kept in range(min(longest - 1, len(self.data)), 0, -1):
            tail = bytes(self.data[-kept:])
            if any(string.startswith(tail) for string in self.stops.strings):
                self.released -= kept
                break


class Observer(Protocol):
    """Who is told of tokens and ends, for the metrics."""

    def first_token(self, seconds: float) -> None:
        """The first token of a sample came, so long after it was asked for."""
        ...

    def sample_ended(self, reason: str, tokens: int, seconds: float) -> None:
        """A sample ended, so long after its first token."""
        ...


class Mailbox:
    """Brings events from the engine's thread to the server's. Made on the latter, within its event loop."""

    def __init__(self):
        self._events: deque[tuple[Generation, int, Sequence[Event], float]] = deque()
        self._loop = asyncio.get_running_loop()
        self._called = False

    def put(self, generation: "Generation", prompt: int, events: Sequence[Event]) -> None:
        """Takes events, on any thread."""
        self._events.append((generation, prompt, events, time.perf_counter()))
        wanted = generation.live or any(event.finish_reason for event in events)
        if wanted and not self._called:
            self._called = True
            try:
                self._loop.call_soon_threadsafe(self.empty)
            except RuntimeError:  # the server has closed its event loop: nobody is there to read
                self._events.clear()

    def empty(self) -> None:
        """Hands all events to their generations, on the server's thread."""
        self._called = False  # first, so that an event which comes meanwhile calls again
        changed = {}
        while self._events:
            generation, prompt, events, when = self._events.popleft()
            generation.receive(prompt, events, when)
            changed[generation] = None
        for generation in changed:
            generation.notify()


class Generation:
    """Samples of one or more prompts on their way.

    Attributes:
        prompts: token ids.
        samples: n of the first prompt, then n of the second, and so on.
        live: whether somebody waits for tokens as they come, not only for the end.
        max_tokens: of each prompt, where the settings leave it open.
        version: grows with everything that comes.
        error: why it failed.
    """

    def __init__(self, prompts: Sequence[Sequence[int]], sampling: Sampling, stops: Stops, live: bool):
        self.prompts, self.sampling = prompts, sampling
        self.live = live or bool(stops.strings)
        self.samples = [
            Sample(prompt * sampling.n + i, prompt, stops)
            for prompt in range(len(prompts))
            for i in range(sampling.n)
        ]
        self.requests: list[Request] = []
        self.max_tokens: list[int | None] = [None] * len(prompts)
        self.version = 0
        self.error: ApiError | None = None
        self.started = time.perf_counter()
        self._first: dict[Sample, float] = {}
        self._left = len(self.samples)
        self._waiting: set[asyncio.Future[None]] = set()
        self._done = asyncio.Event()

    def prepare(self, engine: Engine, mailbox: Mailbox) -> None:
        """Makes the engine's requests. Takes long; to be called in a thread. Raises UserError as
        `Engine.request` does."""
        self._mailbox = mailbox
        for number, prompt in enumerate(self.prompts):
            sampling, limit = self.sampling, self.max_tokens[number]
            if limit is not None:
                sampling = replace(sampling, max_tokens=limit)
            self.requests.append(engine.request(prompt, sampling, partial(mailbox.put, self, number)))

    def submit(self, loop: EngineLoop, vocabulary: Vocabulary, observer: Observer) -> None:
        """Hands all prompts to the engine, or none. Raises UserError as `EngineLoop.take` does."""
        self._loop, self._vocabulary, self._observer = loop, vocabulary, observer
        try:
            for request in self.requests:
                loop.take(request)
        except BaseException:
            self.cancel()
            raise

    @property
    def done(self) -> bool:
        """Whether nothing more will come."""
        return self._left == 0 or self.error is not None

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens whose keys were there already."""
        return sum(request.cached_tokens for request in self.requests)

    def of_prompt(self, prompt: int) -> list[Sample]:
        """The samples of one prompt."""
        n = self.sampling.n
        return self.samples[prompt * n : (prompt + 1) * n]

    def receive(self, prompt: int, events: Sequence[Event], when: float) -> None:
        """Takes the events of a step of one prompt."""
        samples = self.of_prompt(prompt)
        for event in events:
            sample = samples[event.sample]
            if sample.finish_reason is not None:
                continue
            if event.finish_reason in ("error", "cancelled"):
                self._failed(prompt)
                return
            if event.token_ids and not sample.token_ids:
                self._first[sample] = when
                self._observer.first_token(when - self.started)
            sample.take(event, self._vocabulary)
            if sample.finish_reason is not None:
                self._ended(sample, when)
                if event.finish_reason is None:  # a stop string, of which the engine knows nothing
                    self._release(sample)

    def stop(self, sample: Sample) -> None:
        """Ends one sample; what it has so far stays."""
        if sample.finish_reason is None:
            sample.finish_reason, sample.released = "cancelled", len(sample.data)
            self._ended(sample, time.perf_counter())
            self._release(sample)
            self.notify()

    def cancel(self) -> None:
        """Ends everything, within a step of the engine; nobody listens any more."""
        for request in self.requests:
            if not request.finished.is_set():
                self._loop.cancel(request)
        for sample in self.samples:
            if sample.finish_reason is None:
                sample.finish_reason = "cancelled"
                self._ended(sample, time.perf_counter())
        self.notify()

    async def wait(self) -> None:
        """Until all samples have ended. Raises ApiError if the engine could not go on."""
        await self._done.wait()
        self.look()

    async def change(self, seen: int) -> int:
        """Until `version` is no longer `seen`; returns it. Raises ApiError if the engine could not go on."""
        if self.version == seen and not self.done:
            future = asyncio.get_running_loop().create_future()
            self._waiting.add(future)
            try:
                await future
            finally:
                self._waiting.discard(future)
        return self.look()

    def look(self) -> int:
        """The version of what is there. Raises ApiError if the engine could not go on."""
        if self.error:
            raise self.error
        return self.version

    def watch(self) -> None:
        """Sees to it that tokens come as they are made from now on, and takes those that have been."""
        if not self.live:
            self.live = True
            self._mailbox.empty()

    def notify(self) -> None:
        """Wakes those who wait."""
        self.version += 1
        for future in self._waiting:
            if not future.done():
                future.set_result(None)
        if self.done:
            self._done.set()

    def _ended(self, sample: Sample, when: float) -> None:
        self._left -= 1
        first = self._first.get(sample, when)
        self._observer.sample_ended(sample.finish_reason or "", len(sample.token_ids), when - first)

    def _release(self, sample: Sample) -> None:
        """Lets the engine stop with a sample that is not wanted any more."""
        self._loop.cancel(self.requests[sample.prompt], [sample.index % self.sampling.n])

    def _failed(self, prompt: int) -> None:
        cause = self.requests[prompt].error
        if cause is None or not self._loop.healthy:
            why = "the engine has failed" if cause else "the server is shutting down"
            self.error = ApiError(503, why, headers={"retry-after": "5"})
        else:
            self.error = ApiError(
                500, f"the engine could not go on with this request ({type(cause).__name__})"
            )
        self.cancel()
