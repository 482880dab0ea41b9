"""What the routes of one server share: the engine's loop, vocabulary, metrics, and what may be asked for."""

import asyncio
import secrets
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from megatron_codec.errors import UserError
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.inference.sampling import Sampling
from megatron_codec.inference.server.errors import ApiError, from_user_error
from megatron_codec.inference.server.generation import Generation, Mailbox, Stops
from megatron_codec.inference.server.metrics import Metrics
from megatron_codec.inference.server.pictures import Pictures
from megatron_codec.inference.server.protocol import GREEDY, Continuing
from megatron_codec.inference.server.settings import ServerConfig
from megatron_codec.inference.server.text import Vocabulary
from megatron_codec.training import checkpoint

Result = TypeVar("Result")


class Service:
    """Made once a server.

    Attributes:
        closing: whether the server is shutting down.
        created: when the checkpoint was written, in seconds since 1970; where that cannot be told, when the
            server started.
        threads: where `in_thread` calls; few, since the engine needs the interpreter's lock more.
        uploads: where uploaded files are decoded, so that nothing else waits for them; few, since each may
            take much memory.
    """

    def __init__(self, loop: EngineLoop, config: ServerConfig):
        self.loop, self.config, self.engine = loop, config, loop.engine
        self.vocabulary = Vocabulary(self.engine.tokenizer)
        self.metrics = Metrics(loop)
        self.pictures = Pictures(config.picture_seconds)
        self.threads = ThreadPoolExecutor(2, thread_name_prefix="worker")
        self.uploads = ThreadPoolExecutor(2, thread_name_prefix="upload")
        self.closing, self.created = False, _written(config.load)

    @cached_property
    def mailbox(self) -> Mailbox:
        """Made when it is first asked for, within the event loop."""
        return Mailbox()

    @property
    def names(self) -> list[str]:
        """What the model may be called, its own name first."""
        names = [
            *self.config.served_model_name,
            self.config.load.resolve().name,
            f"{self.engine.codec.name}lm",
        ]
        return list(dict.fromkeys(name for name in names if name))

    @property
    def unavailable(self) -> str | None:
        """Why nothing can be asked of the engine, or None."""
        if self.closing:
            return "the server is shutting down"
        return None if self.loop.healthy else "the engine has failed"

    def check_model(self, name: str | None) -> str:
        """The name to answer with. Raises ApiError for a model that is not served here."""
        if name is not None and name not in self.names:
            raise ApiError(
                404, f"the model {ascii(name)[:200]} is not served here; {self.names[0]} is", "model"
            )
        return self.names[0] if name is None else name

    def sampling(self, body: Continuing, **more) -> Sampling:
        """The settings of a body; a seed is drawn where it has none. Raises ApiError."""
        if body.max_tokens is not None and body.max_tokens > (self.config.max_tokens or body.max_tokens):
            raise ApiError(400, f"max_tokens: at most {self.config.max_tokens} on this server", "max_tokens")
        fields = {
            "temperature": 0.0 if 0 <= body.temperature < GREEDY else body.temperature,
            "top_k": max(body.top_k, 0) if body.top_k == -1 else body.top_k,
            "top_p": body.top_p,
            "min_p": body.min_p,
            "seed": secrets.randbelow(2**32) if body.seed is None else body.seed,
            "n": body.n,
            "max_tokens": body.max_tokens,
            "ignore_eos": body.ignore_eos,
            "constrain": body.constrain,
        }
        try:
            return Sampling(**fields | more)
        except UserError as error:
            raise from_user_error(error) from None

    async def in_thread(self, call: Callable[..., Result], *arguments: Any) -> Result:
        """What a call returns that takes long: on the server's own thread all clients would wait for it."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *arguments)

    async def submit(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        stops: Stops | None = None,
        live: bool = False,
    ) -> Generation:
        """Begins to sample. Raises ApiError: too many samples, or what `EngineLoop.submit` refuses.

        Nothing has begun where it is cancelled.
        """
        if len(prompts) * sampling.n > self.config.max_n:
            asked = f"{len(prompts)} prompts x n {sampling.n}" if len(prompts) > 1 else f"n {sampling.n}"
            raise ApiError(400, f"{asked}: at most {self.config.max_n} samples a request on this server", "n")
        stops = replace(stops or Stops(), eos=self.engine.tokenizer.eos)
        generation = Generation(prompts, sampling, stops, live)
        if sampling.max_tokens is None and self.config.max_tokens is not None:
            generation.max_tokens = [self._limit(len(prompt)) for prompt in prompts]
        try:
            await self.in_thread(generation.prepare, self.engine, self.mailbox)
            generation.submit(self.loop, self.vocabulary, self.metrics)
        except UserError as error:
            raise from_user_error(error) from None
        return generation

    def _limit(self, prompt: int) -> int | None:
        """New tokens where the client does not say: as many as the server allows or the context leaves."""
        room = min(self.engine.config.seq_length, self.loop.statistics().cache_total) - prompt
        return min(room, self.config.max_tokens or room) if room > 0 else None

    def close(self) -> None:
        """Ends the threads."""
        for pool in (self.threads, self.uploads):
            pool.shutdown(wait=False, cancel_futures=True)


def _written(load: Path) -> int:
    for path in (load / checkpoint.LATEST, load):
        if path.exists():
            return int(path.stat().st_mtime)
    return int(time.time())
