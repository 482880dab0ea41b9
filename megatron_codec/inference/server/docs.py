"""The OpenAPI document: bodies are read by the server's own code, so they are described here."""

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from megatron_codec.inference.server import protocol
from megatron_codec.inference.server.errors import ErrorReply

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
