"""The application: routes behind a gate, and every error as JSON."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from megatron_codec import __version__
from megatron_codec.inference.loop import EngineLoop
from megatron_codec.inference.server import completions, docs, errors, general, images, megatron, videos
from megatron_codec.inference.server.gate import Gate
from megatron_codec.inference.server.service import Service
from megatron_codec.inference.server.settings import ServerConfig


def create_app(loop: EngineLoop, config: ServerConfig) -> FastAPI:
    """The ASGI application of one engine. `app.state.service` is what its routes share."""
    service = Service(loop, config)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        service.close()

    app = FastAPI(
        title="megatron_codec",
        description="Language models that write JPEG and H.264 files byte by byte.",
        version=__version__,
        lifespan=lifespan,
        responses=docs.ERRORS,
        redirect_slashes=False,
        docs_url=None,  # FastAPI's own page needs the internet
        redoc_url=None,
    )
    app.state.service = service
    app.add_middleware(Gate, service=service)
    app.add_exception_handler(errors.ApiError, errors.on_api_error)
    app.add_exception_handler(HTTPException, errors.on_http_exception)
    app.add_exception_handler(ClientDisconnect, errors.on_client_left)
    app.add_exception_handler(Exception, errors.on_bug)
    for part in (completions, megatron, images, videos, general, docs):
        app.include_router(part.router)
    docs.describe(app)
    return app
