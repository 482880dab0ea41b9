"""What every request passes before a route sees it: key, origin, size, time; and is counted by."""

import asyncio
import hmac
import time
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.service import Service

# /health for load balancers; / is a static page that asks for the key itself.
OPEN = ("/health", "/")
# What can be asked while the server is shutting down.
ALWAYS = ("/health", "/", "/metrics")
PAGE = "/page/"  # its scripts and style


def seconds_left(scope: Scope) -> float:
    """How much of its time a request has left."""
    return scope["megatron_codec.deadline"] - time.monotonic()


def too_slow() -> ApiError:
    """The answer to a request whose time is up."""
    # OpenAI's clients would try again by themselves, with the same result.
    return ApiError(
        408, "the request took longer than this server allows", headers={"x-should-retry": "false"}
    )


class Gate:
    """ASGI middleware. Reads bodies in pieces, so it is written without Starlette's base class."""

    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service, self.config = app, service, service.config
        self._key = service.config.key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serves one request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        scope["megatron_codec.deadline"] = time.monotonic() + self.config.request_seconds
        status = 500  # of what ends without an answer

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal:
                await refusal.response(scope, receive, counted)
            else:
                await self.app(scope, self._limited(scope, receive), counted)
        finally:
            path = getattr(scope.get("route"), "path", "other")
            self.service.metrics.request(path, status, time.perf_counter() - started)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers, path = Headers(scope=scope), scope["path"]
        if self._key is not None and path not in OPEN and not path.startswith(PAGE):
            given = headers.get("authorization", "").encode("latin-1")
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                why = "give the API key in the header Authorization: Bearer KEY"
                return ApiError(401, why, "authorization", {"www-authenticate": "Bearer"})
        origin = headers.get("origin")
        if origin is not None and urlsplit(origin).netloc.lower() != headers.get("host", "").lower():
            # A page of another site, in the browser of somebody who may reach this server.
            return ApiError(403, "pages of other sites may not use this server", "origin")
        if path not in ALWAYS and not path.startswith(PAGE) and (why := self.service.unavailable):
            return ApiError(503, why, headers={"retry-after": "5"})
        size = headers.get("content-length", "")
        if size.isascii() and size.isdigit() and int(size[:20]) > self.config.max_body_bytes:
            return self._too_large()
        return None

    def _too_large(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self.config.max_body_bytes} bytes", "body")

    def _limited(self, scope: Scope, receive: Receive) -> Receive:
        size, reading = 0, True

        async def limited() -> Message:
            nonlocal size, reading
            if not reading:
                return await receive()  # waits for the client to leave, which may take as long as it likes
            # Not `asyncio.wait_for`: before Python 3.12 it may swallow the cancelling of its caller.
            receiving = asyncio.ensure_future(receive())
            try:
                await asyncio.wait((receiving,), timeout=max(0, seconds_left(scope)))
                if not receiving.done():
                    raise too_slow()
                message = receiving.result()
            finally:
                receiving.cancel()
            size += len(message.get("body", b""))
            reading = message.get("more_body", False)
            if size > self.config.max_body_bytes:
                raise self._too_large()
            return message

        return limited
