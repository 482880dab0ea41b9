"""`PUT /api`, as Megatron-LM's text generation server has it, with its faults mended: the seed is obeyed,
top-k and top-p go together, and a bad request has a status of its own."""

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_codec.errors import UserError
from megatron_codec.inference.server.bodies import read_json
from megatron_codec.inference.server.docs import takes
from megatron_codec.inference.server.errors import from_user_error
from megatron_codec.inference.server.generation import Generation
from megatron_codec.inference.server.logprobs import finite
from megatron_codec.inference.server.protocol import Continuing, MegatronBody
from megatron_codec.inference.server.replies import MegatronReply
from megatron_codec.inference.server.responses import Json, finish
from megatron_codec.inference.server.service import Service
from megatron_codec.inference.server.text import to_bytes, to_text

router = APIRouter()


_ROUTE: dict[str, Any] = {"response_model": None, "responses": {200: {"model": MegatronReply}}}


@router.put("/api", operation_id="generate", **_ROUTE, **takes(MegatronBody))
@router.post("/api", operation_id="generate_by_post", **_ROUTE, **takes(MegatronBody))
async def generate(request: Request) -> Response:
    """Continues bytes as characters U+2800 + byte. The answer has the prompts in front."""
    service: Service = request.app.state.service
    body = await read_json(request, MegatronBody)
    generation = await finish(request, _begin(service, body))
    try:
        await finish(request, generation.wait())
    finally:
        generation.cancel()
    return await service.in_thread(lambda: Json(_answer(service, body, generation)))


async def _begin(service: Service, body: MegatronBody) -> Generation:
    tokenizer = service.engine.tokenizer
    bos = [tokenizer.bos] if body.add_BOS else []

    def encoded() -> list[list[int]]:
        return [bos + tokenizer.encode_to_list(to_bytes(text, "prompts")) for text in body.prompts]

    try:
        prompts = await service.in_thread(encoded)
        if not all(prompts):
            raise UserError("prompts with an empty one", "need something to begin with", "set add_BOS")
    except UserError as error:
        raise from_user_error(error) from None
    settings = Continuing(
        max_tokens=body.tokens_to_generate,
        temperature=body.temperature,
        top_k=body.top_k,
        top_p=body.top_p or 1.0,  # 0 is off there
        constrain=body.constrain,
        seed=None if body.random_seed == -1 else body.random_seed,
    )
    scored = body.logprobs or body.tokens_to_generate == 0
    return await service.submit(prompts, service.sampling(settings, prompt_logprobs=scored))


def _answer(service: Service, body: MegatronBody, generation: Generation) -> dict[str, Any]:
    vocabulary = service.vocabulary
    pairs = list(zip(generation.prompts, generation.samples, generation.requests, strict=True))
    tokens = [[*prompt, *sample.token_ids] for prompt, sample, _ in pairs]
    return {
        "text": [to_text(vocabulary.join(ids)) for ids in tokens],
        "segments": [[vocabulary.name[id] for id in ids] for ids in tokens],
        "tokens": tokens,
        "logprobs": [
            [finite(logprob) for logprob in [*request.prompt_logprobs[1:], *sample.logprobs]]
            for _, sample, request in pairs
        ]
        if body.logprobs
        else None,
    }
