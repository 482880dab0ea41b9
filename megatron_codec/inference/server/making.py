"""What the routes of pictures and clips have in common: files that are sampled, whole or while they grow."""

import asyncio
import mimetypes
import time
from collections.abc import AsyncGenerator, Callable
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from megatron_codec.codecs import AvcCodec, Codec
from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.pictures import Frames, Partials, Picture, file_b64
from megatron_codec.inference.server.protocol import ImageBody
from megatron_codec.inference.server.responses import Json, Streamed, finish, sse
from megatron_codec.inference.server.service import Service


class Making:
    """The pictures or clips of one request. Raises ApiError where it asks for what cannot be.

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
            raise ApiError(400, f"size: the model makes files of {self.size} pixels only", "size")
        self.prompt = prompt

    async def begin(self) -> None:
        """Begins to sample. Raises ApiError as `Service.submit` does."""
        service, body = self.service, self.body
        sampling = service.sampling(body, heal_prompt=True)
        self.generation = await service.submit([self.prompt], sampling, live=body.stream)
        # The ids that stay: samples spell the rest of what is given.
        self.prompt = self.generation.requests[0].prompt
        prefix = service.vocabulary.join(self.prompt)
        self.pictures = [
            Picture(self.generation, sample, self.codec, prefix) for sample in self.generation.samples
        ]
        for picture in self.pictures:
            service.pictures.add(picture)

    async def whole(self) -> dict[str, Any]:
        """The answer, when all has ended."""
        data = [await self._result(picture) for picture in self.pictures]
        return {
            "created": int(time.time()),
            **self._format(),
            "data": data,
            "usage": self._usage(self.pictures),
        }

    async def events(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: one with the ids, then unfinished pictures, or how many frames of a clip there
        are, and each when it has ended."""
        ids = [picture.id for picture in self.pictures]
        seed = self.generation.sampling.seed
        yield self._event("started", {"ids": ids, "seed": seed, "prompt_tokens": len(self.prompt)})
        going = {
            picture: (Partials(picture, self.body.partial_images), Frames(picture))
            for picture in self.pictures
        }
        while going:
            seen = self.generation.look()
            for picture, (partials, frames) in list(going.items()):
                if picture.sample.finish_reason is not None:
                    del going[picture]
                    result = await self._result(picture) | self._format()
                    yield self._event("completed", result | {"usage": self._usage([picture])})
                    continue
                what = {
                    "id": picture.id,
                    "index": picture.sample.index,
                    "new_tokens": len(picture.sample.token_ids),
                }
                if (count := frames.new()) is not None:
                    yield self._event("progress", what | {"frames": count})
                for number, stream in partials.new():
                    fields = {"b64_json": file_b64(self.codec, stream), "partial_image_index": number}
                    yield self._event("partial_image", fields | what | self._format())
            if going:
                await self.generation.change(seen)

    def _event(self, name: str, fields: dict[str, Any]) -> bytes:
        name = f"{self.kind}.{name}"
        return sse({"type": name, "created_at": int(time.time())} | fields, name)

    def _format(self) -> dict[str, str]:
        return {"size": self.size, "output_format": mimetypes.types_map.get(self.codec.file_suffix, "/")[6:]}

    async def _result(self, picture: Picture) -> dict[str, Any]:
        # A damaged clip is decoded and encoded anew, and codes of a VQ codec pass a network.
        result = await self.service.in_thread(picture.result)
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


async def answer(request: Request, making: Making) -> Response:
    """The files, in one answer or as events; a client that leaves ends them."""
    await finish(request, making.begin())
    if making.body.stream:
        return Streamed(making.events(), making.generation.cancel)
    try:
        await finish(request, making.generation.wait())
    finally:
        making.generation.cancel()
    return Json(await making.whole())


async def prompt_of(
    request: Request, encode: Callable[[bytes, Any, int], bytes], data: bytes, ratio: float
) -> list[int]:
    """The prompt for the first part of an uploaded file, which is encoded in a thread. Raises ApiError as
    `encode` does."""
    service: Service = request.app.state.service
    engine, most = service.engine, service.config.max_upload_pixels

    def encoded() -> list[int]:
        return engine.prompt_ids(encode(data, engine.codec, most), ratio)

    async def in_thread() -> list[int]:
        return await asyncio.get_running_loop().run_in_executor(service.uploads, encoded)

    return await finish(request, in_thread())


def _size(codec: Codec) -> str:
    if isinstance(codec, AvcCodec):
        return f"{codec.width}x{codec.height}"
    side = getattr(codec, "image_size", 0)
    return f"{side}x{side}"
