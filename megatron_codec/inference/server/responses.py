"""Answers that end when the client leaves or its time is up, and take what they asked for with them."""

import asyncio
import json
from collections.abc import AsyncGenerator, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from megatron_codec.inference.server.errors import CLIENT_LEFT, ApiError
from megatron_codec.inference.server.gate import seconds_left, too_slow

Result = TypeVar("Result")
DONE = b"data: [DONE]\n\n"


class Left(ApiError):
    """The client closed the connection."""

    def __init__(self):
        super().__init__(CLIENT_LEFT, "the client closed the connection")


class Json(Response):
    """JSON without escapes: a character of a stream takes three bytes instead of six."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return to_json(content)


def to_json(content: Any) -> bytes:
    """Compact JSON in UTF-8. Raises ValueError for NaN and infinity, which JSON does not have."""
    return json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()


def sse(content: Any, event: str | None = None) -> bytes:
    """A server-sent event."""
    return (f"event: {event}\n".encode() if event else b"") + b"data: " + to_json(content) + b"\n\n"


async def unless_left(scope: Scope, receive: Receive, work: Coroutine[Any, Any, Result]) -> Result:
    """What `work` returns. It is cancelled when the client leaves (Left) or its time is up (408).

    The body must have been read.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_until_left(receive))
    try:
        await asyncio.wait(
            (working, leaving), timeout=max(0, seconds_left(scope)), return_when=asyncio.FIRST_COMPLETED
        )
        if working.done():
            return working.result()
        raise Left if leaving.done() else too_slow()
    finally:
        working.cancel()
        leaving.cancel()
        await asyncio.gather(working, leaving, return_exceptions=True)


async def finish(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """`unless_left` for a route."""
    return await unless_left(request.scope, request.receive, work)


async def _until_left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Streamed(Response):
    """An answer that is sent piece by piece.

    Args:
        pieces: of the body.
        close: called in any case when no more is sent.
        of_error: what to send when making the pieces fails, or the time is up.
    """

    def __init__(
        self,
        pieces: AsyncGenerator[bytes, None],
        close: Callable[[], object],
        media_type: str = "text/event-stream",
        of_error: Callable[[ApiError], bytes] = lambda error: sse(error.body) + DONE,
    ):
        self.pieces, self.close, self.of_error = pieces, close, of_error
        self.status_code, self.media_type, self.background = 200, media_type, None
        # Proxies such as nginx would collect the pieces otherwise.
        self.init_headers({"cache-control": "no-store", "x-accel-buffering": "no"})

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends all."""

        async def put(data: bytes, more: bool = True) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": more})

        async def pump() -> None:
            async with aclosing(self.pieces) as pieces:
                async for piece in pieces:
                    await put(piece)

        try:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            with suppress(OSError):  # the connection broke
                try:
                    await unless_left(scope, receive, pump())
                except Left:
                    return
                except ApiError as error:
                    await put(self.of_error(error))
                await put(b"", more=False)
        finally:
            self.close()
