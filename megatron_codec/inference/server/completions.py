"""`POST /v1/completions`, as OpenAI's and vLLM's."""

import time
import uuid
from collections.abc import AsyncGenerator, Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from megatron_codec.errors import UserError
from megatron_codec.inference.server.bodies import read_json
from megatron_codec.inference.server.docs import takes
from megatron_codec.inference.server.errors import from_user_error
from megatron_codec.inference.server.generation import Generation, Sample, Stops
from megatron_codec.inference.server.logprobs import completion_logprobs
from megatron_codec.inference.server.pictures import file_b64
from megatron_codec.inference.server.protocol import CompletionBody
from megatron_codec.inference.server.replies import CompletionReply
from megatron_codec.inference.server.responses import DONE, Json, Streamed, finish, sse
from megatron_codec.inference.server.service import Service
from megatron_codec.inference.server.text import to_bytes, to_text

router = APIRouter()


@router.post(
    "/v1/completions",
    response_model=None,
    responses={200: {"model": CompletionReply}},
    **takes(CompletionBody),
)
async def complete(request: Request) -> Response:
    """Continues token ids, or bytes as characters U+2800 + byte."""
    service: Service = request.app.state.service
    completion = Completion(service, await read_json(request, CompletionBody))
    await finish(request, completion.begin())
    if completion.body.stream:
        return Streamed(completion.chunks(), completion.generation.cancel)
    try:
        await finish(request, completion.generation.wait())
    finally:
        completion.generation.cancel()
    return await service.in_thread(lambda: Json(completion.whole()))


class Completion:
    """One request, and what is answered. Raises ApiError where it asks for what cannot be."""

    def __init__(self, service: Service, body: CompletionBody):
        self.service, self.body = service, body
        self.model = service.check_model(body.model)
        self.id, self.created = f"cmpl-{uuid.uuid4().hex}", int(time.time())

    async def begin(self) -> None:
        """Begins to sample. Raises ApiError, as `Service.submit` does too."""
        service, body = self.service, self.body
        try:
            strings = [body.stop] if isinstance(body.stop, str) else body.stop
            strings = tuple(to_bytes(string, "stop") for string in strings)
            self.prompts = await service.in_thread(self._encoded)
        except UserError as error:
            raise from_user_error(error) from None
        stops = Stops(tuple(filter(None, strings)), show=body.include_stop_str_in_output)
        sampling = service.sampling(
            body,
            stop_token_ids=tuple(body.stop_token_ids),
            logprobs=body.logprobs or 0,
            prompt_logprobs=body.echo and (body.logprobs is not None or body.max_tokens == 0),
        )
        self.generation: Generation = await service.submit(self.prompts, sampling, stops, live=body.stream)

    def whole(self) -> dict[str, Any]:
        """The answer, when all has ended. Takes long; to be called in a thread."""
        choices = [self._choice(sample, Sent()) for sample in self.generation.samples]
        return self._envelope(choices) | {"usage": self._usage()}

    async def chunks(self) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events, as it is sampled."""
        generation, usage = self.generation, {}
        with_usage = self.body.stream_options is not None and self.body.stream_options.include_usage
        if with_usage:
            usage = {"usage": None}
        sent = {sample: Sent() for sample in generation.samples}
        while sent:
            seen = generation.look()
            for sample, before in list(sent.items()):
                # Asked once: while a chunk is sent, the sample may come to its end.
                ended = sample.finish_reason is not None
                if ended and self.body.return_image:
                    choice = await self.service.in_thread(self._choice, sample, before)
                elif ended or len(sample.token_ids) > before.tokens:
                    choice = self._choice(sample, before)
                else:
                    continue
                if ended:
                    del sent[sample]
                yield sse(self._envelope([choice]) | usage)
            if sent:
                await generation.change(seen)
        if with_usage:
            yield sse(self._envelope([]) | {"usage": self._usage()})
        yield DONE

    def _encoded(self) -> list[list[int]]:
        tokenizer = self.service.engine.tokenizer
        return [
            [tokenizer.bos, *tokenizer.encode_to_list(to_bytes(prompt, "prompt"))]
            if isinstance(prompt, str)
            else prompt
            for prompt in _several(self.body.prompt)
        ]

    def _envelope(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _choice(self, sample: Sample, sent: "Sent") -> dict[str, Any]:
        """What there is of a sample beyond what has been sent."""
        body, vocabulary = self.body, self.service.vocabulary
        prompt, first, ended = self.prompts[sample.prompt], not sent.begun, sample.finish_reason is not None
        shown = prompt if body.echo and first else []
        data = vocabulary.join(shown) + bytes(sample.data[sent.data : sample.released])
        choice: dict[str, Any] = {
            "index": sample.index,
            "text": to_text(data),
            "logprobs": None,
            "finish_reason": sample.finish_reason,
            "stop_reason": _stop_reason(sample),
        }
        if body.logprobs is not None:
            request, new = self.generation.requests[sample.prompt], sample.token_ids[sent.tokens :]
            ids = [*shown, *new]
            likeliest = [{}] * len(ids)
            if body.logprobs > 0:
                likeliest = [*request.prompt_top_logprobs[: len(shown)], *sample.top_logprobs[sent.tokens :]]
            logprobs = [*request.prompt_logprobs[: len(shown)], *sample.logprobs[sent.tokens :]]
            choice["logprobs"] = completion_logprobs(vocabulary, ids, logprobs, likeliest, sent.offset)
            sent.offset += sum(len(vocabulary.text[id]) for id in ids)
        if body.return_token_ids:
            choice["prompt_token_ids"] = list(prompt) if first else None
            choice["token_ids"] = sample.token_ids[sent.tokens :]
        if body.return_removed:
            choice |= {"removed": sample.removed[sent.tokens :], "redrawn": sample.redrawn}
        if body.return_image and ended:
            stream = vocabulary.join(prompt) + bytes(sample.data)
            valid = self.service.engine.codec.check(stream).valid
            self.service.metrics.picture(valid, sample.redrawn)
            choice |= {"b64_json": file_b64(self.service.engine.codec, stream), "valid": valid}
        sent.begun, sent.tokens, sent.data = True, len(sample.token_ids), sample.released
        return choice

    def _usage(self) -> dict[str, Any]:
        prompt = sum(map(len, self.prompts))
        new = sum(len(sample.token_ids) for sample in self.generation.samples)
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.generation.cached_tokens},
        }


class Sent:
    """How much of a sample has been sent: whether anything, tokens, bytes, and characters of tokens."""

    def __init__(self):
        self.begun, self.tokens, self.data, self.offset = False, 0, 0, 0


def _several(prompt: Any) -> Iterator[str | list[int]]:
    """The prompts of the four shapes that one field may have."""
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        yield prompt
    else:
        yield from prompt


def _stop_reason(sample: Sample) -> str | int | None:
    reason = sample.stop_reason
    return to_text(reason) if isinstance(reason, bytes) else reason
