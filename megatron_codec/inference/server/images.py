"""`/v1/images`: pictures from nothing or from the first part of a picture, whole or while they grow."""

import mimetypes
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_codec.codecs import AvcCodec, JpegCodec
from megatron_codec.inference.server.bodies import read_edit, read_json
from megatron_codec.inference.server.docs import takes
from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.making import Making, answer, prompt_of
from megatron_codec.inference.server.pictures import Painter, encode_upload
from megatron_codec.inference.server.protocol import EditBody, EditFields, EditForm, ImageBody
from megatron_codec.inference.server.replies import CancelReply, ImagesReply
from megatron_codec.inference.server.responses import Json, Streamed
from megatron_codec.inference.server.service import Service

router = APIRouter()
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": ImagesReply}}


@router.post("/v1/images/generations", response_model=None, responses=_ANSWER, **takes(ImageBody))
async def generations(request: Request) -> Response:
    """Makes pictures from nothing."""
    service = _service(request)
    body = await read_json(request, ImageBody)
    return await answer(request, Making(service, body, service.engine.prompt_ids(), "image_generation"))


@router.post("/v1/images/edits", response_model=None, responses=_ANSWER, **takes(EditBody, EditForm))
async def edits(request: Request) -> Response:
    """Keeps the first part of a picture and makes the rest anew."""
    service = _service(request)
    body, data = await read_edit(request, "image", EditBody, EditFields)
    prompt = await prompt_of(request, encode_upload, data, body.prompt_ratio)
    return await answer(request, Making(service, body, prompt, "image_edit"))


@router.get(
    "/v1/images/{name}",
    response_model=None,
    responses={200: {"content": {"image/jpeg": {}}, "description": "The file, as far as it is made"}},
)
async def paint(request: Request, name: str) -> Response:
    """The file of a picture, ID.jpg, while it is made: a browser shows it growing."""
    service: Service = request.app.state.service
    codec = service.engine.codec
    picture = service.pictures.get(name.removesuffix(codec.file_suffix))
    if not isinstance(codec, JpegCodec):
        raise ApiError(404, f"files of the codec {codec.name} cannot be shown while they are made", "id")

    async def pieces() -> AsyncGenerator[bytes, None]:
        painter, generation = Painter(picture), picture.generation
        generation.watch()
        while True:
            seen, ended = generation.version, picture.sample.finish_reason is not None
            if piece := painter.new():
                yield piece
            if ended:
                return
            with suppress(ApiError):  # the sample has ended with it; its file is closed where it stands
                await generation.change(seen)

    media_type = mimetypes.types_map.get(codec.file_suffix, "application/octet-stream")
    return Streamed(pieces(), lambda: None, media_type, of_error=lambda _: b"")


@router.delete("/v1/images/{name}", response_model=None, responses={200: {"model": CancelReply}})
@router.post("/v1/images/{name}/cancel", response_model=None, responses={200: {"model": CancelReply}})
async def cancel(request: Request, name: str) -> Response:
    """Stops making a picture. What there is of it is kept, and answered as finished."""
    service: Service = request.app.state.service
    picture = service.pictures.get(name.removesuffix(service.engine.codec.file_suffix))
    picture.generation.stop(picture.sample)
    return Json({"id": picture.id, "finish_reason": picture.sample.finish_reason})


def _service(request: Request) -> Service:
    """Raises ApiError where the model makes clips."""
    service: Service = request.app.state.service
    if isinstance(service.engine.codec, AvcCodec):
        raise ApiError(404, "this model makes clips: POST /v1/videos/generations or /v1/videos/edits")
    return service
