"""The engine in a thread of its own, for a server: requests come in from any thread, events go out.

loop = EngineLoop(engine)
request = loop.submit(prompt_ids, Sampling(n=4, seed=7), deliver=print)
request.finished.wait()
loop.stop(grace=30)
"""

import logging
import threading
import time
from collections.abc import Collection, Sequence
from dataclasses import replace

from megatron_codec.errors import UserError
from megatron_codec.inference.engine import Engine
from megatron_codec.inference.requests import Deliver, Request, Statistics
from megatron_codec.inference.sampling import Sampling

logger = logging.getLogger(__name__)
HEARTBEAT = 0.5  # seconds between signs of life among the processes of an idle engine


class Overloaded(UserError):
    """As many requests wait as may wait."""


class Stopped(UserError):
    """The engine takes no more requests: it is shutting down, or it has failed."""


class EngineLoop:
    """Steps an engine for as long as there are requests.

    Args:
        engine: nobody else may use it from now on.
        max_requests: open at once, waiting ones included; more are refused.

    Attributes:
        failure: what ended the engine, if it failed.
    """

    def __init__(self, engine: Engine, max_requests: int = 1024):
        self.engine, self.max_requests = engine, max_requests
        self.failure: BaseException | None = None
        self._open: dict[int, Request] = {}
        self._added: list[Request] = []
        self._cancelled: list[tuple[Request, Collection[int] | None]] = []
        self._closing = False
        self._deadline = float("inf")
        self._hurried = False
        self._news = threading.Condition()
        self._statistics = engine.statistics()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether the engine, on all its processes, goes on."""
        return self.failure is None and self._thread.is_alive()

    def submit(self, prompt: Sequence[int], sampling: Sampling, deliver: Deliver) -> Request:
        """Takes a request; its events go to `deliver`, on the engine's thread, until `Request.finished`.

        Raises:
            UserError: the prompt or its samples cannot fit, or ids are out of range.
            Overloaded: too many requests are open.
            Stopped: the engine is shutting down or has failed.
        """
        return self.take(self.engine.request(prompt, sampling, deliver))

    def take(self, request: Request) -> Request:
        """`submit` of a request that `Engine.request` has made, which takes long for a long prompt.

        Raises:
            Overloaded: too many requests are open.
            Stopped: the engine is shutting down or has failed.
        """
        with self._news:
            if self._closing or not self.healthy:
                raise Stopped("the engine", f"failed: {self.failure}" if self.failure else "is shutting down")
            if len(self._open) >= self.max_requests:
                raise Overloaded(f"{len(self._open)} open requests", "are as many as are taken", "try later")
            self._open[request.number] = request
            self._added.append(request)
            self._news.notify()
        return request

    def cancel(self, request: Request, samples: Collection[int] | None = None) -> None:
        """Ends a request, or some of its samples by number, within one step; nothing happens if they have
        ended already."""
        with self._news:
            if request.number in self._open:
                self._cancelled.append((request, samples))
                self._news.notify()

    def statistics(self) -> Statistics:
        """As of the last step, with requests that the engine has not seen yet."""
        with self._news:
            return replace(self._statistics, waiting=self._statistics.waiting + len(self._added))

    def stop(self, grace: float = 0) -> bool:
        """Takes no more requests, lets the open ones finish for `grace` seconds, cancels the others, and
        ends the thread. Returns whether the engine was well until then."""
        with self._news:
            self._closing = True
            self._deadline = time.monotonic() + grace
            self._news.notify()
        self._thread.join()
        return self.failure is None

    def hurry(self) -> None:
        """Takes away what is left of the grace of a `stop` that waits, or that is to come."""
        with self._news:
            self._hurried = True
            self._news.notify()

    def _run(self) -> None:
        try:
            while self._turn():
                pass
            self.engine.close()
        except BaseException as error:  # whatever it was, nobody may wait for ever
            logger.exception("the engine failed")
            with self._news:
                self.failure = error
                left = list(self._open.values())
            for request in left:
                request.fail(error)

    def _turn(self) -> bool:
        """Takes in what came, and makes one step. False when all is done."""
        with self._news:
            if not (self._added or self._cancelled or self._closing or self.engine.busy):
                self._news.wait(HEARTBEAT)
            added, self._added = self._added, []
            cancelled, self._cancelled = self._cancelled, []
            if self._closing and (self._hurried or time.monotonic() > self._deadline):
                cancelled = [(request, None) for request in self._open.values()]
        for request in added:
            self.engine.add(request)
        for request, samples in cancelled:
            self.engine.cancel(request, samples)
        self.engine.step()
        with self._news:
            self._statistics = self.engine.statistics()
            self._open = {number: r for number, r in self._open.items() if not r.finished.is_set()}
            return bool(self._open) or not self._closing
