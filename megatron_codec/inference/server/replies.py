"""What the routes answer, for the OpenAPI document. The answers themselves are plain dicts."""

from pydantic import BaseModel


class TokenDetails(BaseModel):
    """Of the prompt's tokens, those that were known already."""

    cached_tokens: int


class Usage(BaseModel):
    """Counts of tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: TokenDetails


class Logprobs(BaseModel):
    """Of each token: its text, log-probability, the likeliest ones in its place, and where it stands."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class Choice(BaseModel):
    """One sample of a completion."""

    index: int
    text: str
    logprobs: Logprobs | None = None
    finish_reason: str | None = None
    stop_reason: str | int | None = None
    prompt_token_ids: list[int] | None = None
    token_ids: list[int] | None = None
    removed: list[float] | None = None
    redrawn: int | None = None
    b64_json: str | None = None
    valid: bool | None = None


class CompletionReply(BaseModel):
    """The answer of `POST /v1/completions`."""

    id: str
    object: str
    created: int
    model: str
    choices: list[Choice]
    usage: Usage


class MegatronReply(BaseModel):
    """The answer of `PUT /api`: of each prompt with its continuation the text, the text of each token, the
    ids, and the log-probabilities of all tokens but the first."""

    text: list[str]
    segments: list[list[str]]
    tokens: list[list[int]]
    logprobs: list[list[float]] | None


class ImageItem(BaseModel):
    """One picture."""

    b64_json: str | None
    id: str
    seed: int
    index: int
    valid: bool
    bytes: int  # of the codec's stream
    removed: float
    redrawn: int
    reason: str
    finish_reason: str
    new_tokens: int
    share_made_up: float | None = None  # of a clip


class ImageTokenDetails(BaseModel):
    """What the prompt's tokens are of."""

    text_tokens: int
    image_tokens: int


class ImageUsage(BaseModel):
    """Counts of tokens of pictures."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: ImageTokenDetails


class ImagesReply(BaseModel):
    """The answer of the image routes."""

    created: int
    size: str
    output_format: str
    data: list[ImageItem]
    usage: ImageUsage


class ModelItem(BaseModel):
    """A name of the model, with what a client may want to know of it."""

    id: str
    object: str
    created: int
    owned_by: str
    max_model_len: int
    max_body_bytes: int  # of a request on this server
    codec: dict
    num_tokens: int
    bos: int
    eos: int
    dtype: str | None  # that it computes in; None is what the model was trained in
    weight_dtype: str | None  # of the layers' weights; None is that of dtype
    canonical: bool
    in_range: bool


class ModelsReply(BaseModel):
    """The answer of `GET /v1/models`."""

    object: str
    data: list[ModelItem]


class HealthReply(BaseModel):
    """The answer of `GET /health`."""

    status: str


class CancelReply(BaseModel):
    """The answer to stopping a picture."""

    id: str
    finish_reason: str
