"""Reads bodies into the models of `protocol.py`."""

import base64
import binascii
from typing import TypeVar

from fastapi import Request
from pydantic import ValidationError
from starlette.datastructures import UploadFile

from megatron_codec.inference.server.errors import ApiError, from_validation
from megatron_codec.inference.server.protocol import Body

Model = TypeVar("Model", bound=Body)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, model: type[Model]) -> Model:
    """The body as a model. Raises ApiError for anything else.

    A browser sends a form or plain text to any site without asking, but JSON only after asking: so its type
    is insisted on.
    """
    if _media_type(request) != "application/json":
        raise ApiError(415, "send JSON, with the header Content-Type: application/json", "content-type")
    try:
        # pydantic's own parser knows no NaN as JSON, and bounds depth and digits.
        return model.model_validate_json(await request.body())
    except ValidationError as error:
        raise from_validation(error) from None


async def read_edit(
    request: Request, name: str, model: type[Body], fields_of_form: type[Model]
) -> tuple[Model, bytes]:
    """The fields and the file of an edit, of JSON or of multipart/form-data. Raises ApiError.

    Args:
        name: of the field that holds the file.
        model: of the JSON body, which has the fields of a form and the file in base64.
    """
    if _media_type(request) != "multipart/form-data":
        body = await read_json(request, model)
        assert isinstance(body, fields_of_form)
        file: str = getattr(body, name)
        encoded = file.partition(",")[2] if file.startswith("data:") else file
        try:
            return body, base64.b64decode(encoded, validate=True)
        except (binascii.Error, ValueError) as error:
            raise ApiError(400, f"{name}: is not base64: {error}", name) from None
    async with request.form(max_files=1, max_fields=64) as form:
        upload = form.get(name) or form.get(f"{name}[]")
        if not isinstance(upload, UploadFile):
            raise ApiError(400, f"{name}: a file is required", name)
        fields = {name: value for name, value in form.items() if isinstance(value, str)}
        data = await upload.read()
    try:
        return fields_of_form.model_validate_strings(fields, strict=False), data
    except ValidationError as error:
        raise from_validation(error) from None
