"""`/v1/videos`: clips from nothing or from the first frames of a video."""

import io
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_codec.codecs import AvcCodec
from megatron_codec.inference.server.bodies import read_edit, read_json
from megatron_codec.inference.server.docs import takes
from megatron_codec.inference.server.errors import ApiError
from megatron_codec.inference.server.making import Making, answer, prompt_of
from megatron_codec.inference.server.protocol import VideoBody, VideoEditBody, VideoEditFields, VideoEditForm
from megatron_codec.inference.server.replies import ImagesReply
from megatron_codec.inference.server.service import Service

router = APIRouter()
_ANSWER: dict[int | str, dict[str, Any]] = {200: {"model": ImagesReply}}
_EDIT = takes(VideoEditBody, VideoEditForm)


@router.post("/v1/videos/generations", response_model=None, responses=_ANSWER, **takes(VideoBody))
async def video_generations(request: Request) -> Response:
    """Makes clips from nothing."""
    service, _ = _model(request)
    body = await read_json(request, VideoBody)
    return await answer(request, Making(service, body, service.engine.prompt_ids(), "video_generation"))


@router.post("/v1/videos/edits", response_model=None, responses=_ANSWER, **_EDIT)
async def video_edits(request: Request) -> Response:
    """Keeps the first frames of a video and makes the rest of the clip anew."""
    service, codec = _model(request)
    body, data = await read_edit(request, "video", VideoEditBody, VideoEditFields)
    given = codec.frames * 2 // 3 if body.prompt_frames is None else body.prompt_frames
    if given > codec.frames:
        raise ApiError(400, f"prompt_frames: a clip of this model has {codec.frames} frames", "prompt_frames")
    prompt = await prompt_of(request, encode_upload, data, given / codec.frames)
    return await answer(request, Making(service, body, prompt, "video_edit"))


def encode_upload(data: bytes, codec: AvcCodec, max_pixels: int) -> bytes:
    """The stream of the first clip of an uploaded video file. To be called in a thread. Raises ApiError."""
    try:
        return next(codec.encode_clips(io.BytesIO(data), max_pixels=max_pixels))
    except Exception as error:  # whatever a reader of damaged files comes to, the file is at fault
        why = f"video: {len(data)} bytes that cannot be made a clip: {error}"
        raise ApiError(400, why, "video") from None


def _model(request: Request) -> tuple[Service, AvcCodec]:
    """Raises ApiError where the model makes no clips."""
    service: Service = request.app.state.service
    codec = service.engine.codec
    if not isinstance(codec, AvcCodec):
        raise ApiError(404, "this model makes pictures: POST /v1/images/generations or /v1/images/edits")
    return service, codec
