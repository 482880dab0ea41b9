"""What is the same for every kind of model: its names, health, metrics and the page."""

from importlib.resources import files
from pathlib import PurePath
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST

from megatron_codec.inference.server.errors import ApiError, ErrorReply
from megatron_codec.inference.server.replies import HealthReply, ModelItem, ModelsReply
from megatron_codec.inference.server.responses import Json
from megatron_codec.inference.server.service import Service

router = APIRouter()


_PAGE = files("megatron_codec.inference.server").joinpath("page")
_KINDS = {".css": "text/css", ".js": "text/javascript"}


@router.get("/", response_model=None, response_class=HTMLResponse)
async def page() -> Response:
    """The page. Needs no key: it is the same for all, and asks for the key."""
    return HTMLResponse(_PAGE.joinpath("index.html").read_bytes())


@router.get(
    "/page/{name}",
    response_model=None,
    responses={200: {"content": {kind: {} for kind in _KINDS.values()}, "description": "The file"}},
)
async def page_file(name: str) -> Response:
    """A script or the style of the page. Needs no key either."""
    for file in _PAGE.iterdir():  # the name is compared, and never a path
        if file.name == name and (kind := _KINDS.get(PurePath(name).suffix)):
            return Response(file.read_bytes(), media_type=kind, headers={"cache-control": "no-cache"})
    raise ApiError(404, "the page has no such file")


@router.get(
    "/health", response_model=None, responses={200: {"model": HealthReply}, 503: {"model": ErrorReply}}
)
async def health(request: Request) -> Response:
    """Whether requests can be served. Needs no key."""
    service: Service = request.app.state.service
    if why := service.unavailable:
        error = {"message": why, "type": "server_error", "param": None, "code": 503}
        return Json({"status": why, "error": error}, 503)
    return Json({"status": "ok"})


@router.get(
    "/metrics",
    response_model=None,
    responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}},
)
async def metrics(request: Request) -> Response:
    """Counts and times for Prometheus."""
    service: Service = request.app.state.service
    return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)


@router.get("/v1/models", response_model=None, responses={200: {"model": ModelsReply}})
async def models(request: Request) -> Response:
    """The names that the model answers to."""
    service: Service = request.app.state.service
    return Json({"object": "list", "data": [_model(service, name) for name in service.names]})


@router.get("/v1/models/{name}", response_model=None, responses={200: {"model": ModelItem}})
async def model(request: Request, name: str) -> Response:
    """One of them."""
    service: Service = request.app.state.service
    return Json(_model(service, service.check_model(name)))


def _model(service: Service, name: str) -> dict[str, Any]:
    engine, settings = service.engine, service.config.engine
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "megatron_codec",
        "max_model_len": engine.config.seq_length,
        "max_body_bytes": service.config.max_body_bytes,
        "codec": engine.codec.to_dict(),
        "num_tokens": engine.tokenizer.num_tokens,
        "bos": engine.tokenizer.bos,
        "eos": engine.tokenizer.eos,
        "dtype": settings.dtype,
        "weight_dtype": settings.weight_dtype,
        "canonical": settings.canonical,
        "in_range": settings.in_range,
    }
