"""`/v1/images`: pictures from nothing or from the first part of a picture, whole or while they grow."""

import asyncio
import mimetypes
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_codec.codecs import Codec, JpegCodec
from megatron_codec.inference.server.bodies import read_edit, read_json
from megatron_codec.inference.server.docs import takes
from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.pictures import Painter, Partials, Picture, encode_upload, file_b64
from megatron_codec.inference.server.protocol import EditBody, EditForm, ImageBody
from megatron_codec.inference.server.replies import CancelReply, ImagesReply
from megatron_codec.inference.server.responses import Json, Streamed, finish, sse
from megatron_codec.inference.server.service import Service

router = APIRouter()
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": ImagesReply}}


@router.post("/v1/images/generations", response_model=None, responses=_ANSWER, **takes(ImageBody))
async def generations(request: Request) -> Response:
    """Makes pictures from nothing."""
    service: Service = request.app.state.service
    body = await read_json(request, ImageBody)
    return await _answer(request, Making(service, body, service.engine.prompt_ids(), "image_generation"))


@router.post("/v1/images/edits", response_model=None, responses=_ANSWER, **takes(EditBody, EditForm))
async def edits(request: Request) -> Response:
    """Keeps the first part of a picture and makes the rest anew."""
    service: Service = request.app.state.service
    body, data = await read_edit(request)
    codec, most = service.engine.codec, service.config.max_upload_pixels
    decoding = asyncio.get_running_loop().run_in_executor(service.threads, encode_upload, data, codec, most)
    stream = await finish(request, _result(decoding))
    prompt = service.engine.prompt_ids(stream, body.prompt_ratio)
    return await _answer(request, Making(service, body, prompt, "image_edit"))


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


class Making:
    """The pictures of one request, begun. Raises ApiError where it asks for what cannot be.

    Args:
        prompt: ids of the part that is given.
        kind: what events are called after.
    """

    def __init__(self, service: Service, body: ImageBody, prompt: list[int], kind: str):
        service.check_model(body.model)
        self.service, self.body, self.kind = service, body, kind
        self.codec: Codec = service.engine.codec
        self.size = _size(self.codec)
        if body.size not in ("auto", self.size):
            raise ApiError(400, f"size: the model makes pictures of {self.size} pixels only", "size")
        self.prompt, prefix = prompt, service.vocabulary.join(prompt)
        self.generation = service.submit([prompt], service.sampling(body), live=body.stream)
        self.pictures = [
            Picture(self.generation, sample, self.codec, prefix) for sample in self.generation.samples
        ]
        for picture in self.pictures:
            service.pictures.add(picture)

    def whole(self) -> dict[str, Any]:
        """The answer, when all has ended."""
        data = [self._result(picture) for picture in self.pictures]
        return {
            "created": int(time.time()),
            **self._format(),
            "data": data,
            "usage": self._usage(self.pictures),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: one with the ids, then unfinished pictures, and each when it has ended."""
        ids = [picture.id for picture in self.pictures]
        seed = self.generation.sampling.seed
        yield self._event("started", {"ids": ids, "seed": seed, "prompt_tokens": len(self.prompt)})
        going = {picture: Partials(picture, self.body.partial_images) for picture in self.pictures}
        while going:
            seen = self.generation.look()
            for picture, partials in list(going.items()):
                if picture.sample.finish_reason is not None:
                    del going[picture]
                    result = self._result(picture) | self._format()
                    yield self._event("completed", result | {"usage": self._usage([picture])})
                    continue
                for number, stream in partials.new():
                    fields = {
                        "b64_json": file_b64(self.codec, stream),
                        "partial_image_index": number,
                        "id": picture.id,
                        "index": picture.sample.index,
                        "new_tokens": len(picture.sample.token_ids),
                    }
                    yield self._event("partial_image", fields | self._format())
            if going:
                await self.generation.change(seen)

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        name = f"{self.kind}.{name}"
        return sse({"type": name, "created_at": int(time.time())} | fields, name)

    def _format(self) -> dict[str, str]:
        return {"size": self.size, "output_format": mimetypes.types_map.get(self.codec.file_suffix, "/")[6:]}

    def _result(self, picture: Picture) -> dict[str, Any]:
        result = picture.result()
        self.service.metrics.picture(result["valid"], picture.sample.redrawn)
        return result

    def _usage(self, pictures: list[Picture]) -> dict[str, Any]:
        new = sum(len(picture.sample.token_ids) for picture in pictures)
        return {
            "input_tokens": len(self.prompt),
            "output_tokens": new,
            "total_tokens": len(self.prompt) + new,
            "input_tokens_details": {"text_tokens": 0, "image_tokens": len(self.prompt)},
        }


async def _answer(request: Request, making: Making) -> Response:
    if making.body.stream:
        return Streamed(making.events(), making.generation.cancel)
    try:
        await finish(request, making.generation.wait())
    finally:
        making.generation.cancel()
    return Json(making.whole())


async def _result(future: asyncio.Future[bytes]) -> bytes:
    return await future


def _size(codec: Codec) -> str:
    side = getattr(codec, "image_size", 0)
    return f"{side}x{side}"
