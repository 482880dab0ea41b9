"""The OpenAPI document, and a page that shows it.

Bodies are read by the server's own code, so they are described here. FastAPI's own page takes Swagger UI from
a CDN, which a cluster may not reach; its files come from the package `fastapi-offline` instead.
"""

from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import APIRouter, FastAPI
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import FileResponse, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from megatron_codec.inference.server import protocol
from megatron_codec.inference.server.errors import ApiError, ErrorReply

router = APIRouter(include_in_schema=False)
_SWAGGER = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_NOTHING_FROM_OUTSIDE = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline'"
)
_REF = "#/components/schemas/{model}"
BODIES: tuple[type[BaseModel], ...] = (
    protocol.CompletionBody,
    protocol.MegatronBody,
    protocol.ImageBody,
    protocol.EditBody,
    protocol.EditForm,
    protocol.VideoBody,
    protocol.VideoEditBody,
    protocol.VideoEditForm,
)
ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorReply, "description": "What the client got wrong; `param` names the field"},
    503: {"model": ErrorReply, "description": "The engine has failed, or the server is shutting down"},
}


def takes(json: type[BaseModel], form: type[BaseModel] | None = None) -> dict[str, Any]:
    """Arguments of a route that reads such a body."""
    content = {"application/json": _schema(json)} | ({"multipart/form-data": _schema(form)} if form else {})
    return {"openapi_extra": {"requestBody": {"required": True, "content": content}}}


@router.get("/docs")
async def docs_page() -> Response:
    """The routes, to read and to try."""
    page = get_swagger_ui_html(
        # Relative, for a server that a proxy shows under another path.
        openapi_url="openapi.json",
        title="megatron_codec: routes",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},
    )
    page.headers["content-security-policy"] = _NOTHING_FROM_OUTSIDE
    return page


@router.get("/docs/{name}")
async def docs_file(name: str) -> Response:
    """A file of Swagger UI."""
    for file, kind in _SWAGGER.items():  # the name is compared, and never a path
        if file == name:
            folder = Path(str(files("fastapi_offline").joinpath("static")))
            return FileResponse(folder / file, media_type=kind)
    raise ApiError(404, "the page has no such file")


def describe(app: FastAPI) -> None:
    """Completes the document that FastAPI makes."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        known, document = app.openapi_schema is not None, make()
        if not known:
            _, definitions = models_json_schema([(body, "validation") for body in BODIES], ref_template=_REF)
            schemas = document.setdefault("components", {}).setdefault("schemas", {})
            schemas |= definitions["$defs"]
            for unused in ("HTTPValidationError", "ValidationError"):
                schemas.pop(unused, None)
            for path in document["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)  # every fault of a client's is a 400 here
        return document

    app.openapi = openapi  # type: ignore[method-assign]


def _schema(model: type[BaseModel]) -> dict[str, Any]:
    return {"schema": {"$ref": _REF.format(model=model.__name__)}}
