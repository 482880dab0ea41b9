"""What a client is told when something is wrong: `{"error": {message, type, param, code}}`, as OpenAI does.

`param` is the name of the field at fault. What the client got wrong has a status from 400 to 499.
"""

import json
import re
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException

from megatron_codec.errors import UserError, UserErrors
from megatron_codec.inference.loop import Overloaded, Stopped

CLIENT_LEFT = 499  # nginx's number; nobody reads that answer, but it is counted
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class ErrorBody(BaseModel):
    """What went wrong, with which field."""

    message: str
    type: str
    param: str | None
    code: int


class ErrorReply(BaseModel):
    """The body of every answer that is no success."""

    error: ErrorBody


class ApiError(Exception):
    """An answer that is no success.

    Args:
        status: of HTTP.
        message: for a person.
        param: the field at fault.
        headers: of the response.
    """

    def __init__(
        self, status: int, message: str, param: str | None = None, headers: dict[str, str] | None = None
    ):
        super().__init__(message)
        self.status, self.message, self.param, self.headers = status, message, param, headers or {}

    @property
    def body(self) -> dict[str, Any]:
        """The JSON object."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {
            "error": ErrorBody(
                message=self.message, type=kind, param=self.param, code=self.status
            ).model_dump()
        }

    @property
    def response(self) -> JSONResponse:
        """The answer."""
        return AsciiResponse(self.body, self.status, headers=self.headers)


class AsciiResponse(JSONResponse):
    """JSON in ASCII, so that any text that a client sent can be quoted, half a surrogate pair too."""

    def render(self, content: Any) -> bytes:
        """The bytes of the body."""
        return json.dumps(content).encode()


def from_user_error(error: UserError) -> ApiError:
    """The answer to a fault that the engine, the codec or `Sampling` found; its value begins with a name."""
    if isinstance(error, UserErrors):
        first = from_user_error(error.faults[0])
        return ApiError(first.status, str(error), first.param)
    if isinstance(error, Overloaded):
        return ApiError(429, str(error), headers={"retry-after": "1"})
    if isinstance(error, Stopped):
        return ApiError(503, str(error), headers={"retry-after": "5"})
    name = re.match(r"[a-z][a-z_]*", error.value)
    return ApiError(400, str(error), name.group() if name else None)


def from_validation(error: ValidationError) -> ApiError:
    """The answer to a body that is not what the route takes; the first fault counts."""
    fault = error.errors(include_url=False, include_input=False)[0]
    cause = fault.get("ctx", {}).get("error")
    if isinstance(cause, UserError):
        return from_user_error(cause)
    param = ".".join(str(part) for part in fault["loc"]) or None
    return ApiError(400, f"{param}: {fault['msg']}" if param else fault["msg"], param)


async def on_api_error(_: Request, error: Exception) -> JSONResponse:
    """Handler of `ApiError`."""
    assert isinstance(error, ApiError)
    return error.response


async def on_http_exception(_: Request, error: Exception) -> JSONResponse:
    """Handler of what the framework itself refuses: unknown paths, wrong methods, broken multipart bodies."""
    assert isinstance(error, HTTPException)
    return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {})).response


async def on_client_left(_: Request, __: Exception) -> JSONResponse:
    """Handler of a client that leaves while its body is read."""
    return ApiError(CLIENT_LEFT, "the client closed the connection").response


async def on_bug(_: Request, error: Exception) -> JSONResponse:
    """Handler of everything else: a fault of the server, whose details go to its log only."""
    return ApiError(500, f"the server made a mistake ({type(error).__name__}); its log says more").response
