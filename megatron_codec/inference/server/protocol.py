"""The bodies that clients send, checked as they are read.

Types are strict: no "5" for 5, no NaN. null means the same as leaving a field out. Ranges of the sampling
settings are `Sampling`'s to judge. Unknown fields are let through, since clients of other servers send many;
but those that would change the result there, and cannot here, are refused unless they are neutral.
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from megatron_codec.errors import UserError

MAX_LOGPROBS = 20
MAX_STOPS, MAX_STOP_LENGTH = 16, 128  # they are looked for after every token
GREEDY = 1e-5  # temperatures below are 0, as in vLLM: dividing by them leaves no finite number

Int32 = Annotated[int, Field(ge=-(2**31), lt=2**31)]
Seed = Annotated[int, Field(ge=-(2**63), lt=2**63)]


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _check_prompt(prompt: Any) -> Any:
    if isinstance(prompt, str):
        return prompt
    if isinstance(prompt, list) and prompt:
        if all(isinstance(part, str) for part in prompt) or all(map(_is_id, prompt)):
            return prompt
        if all(isinstance(part, list) and all(map(_is_id, part)) for part in prompt):
            return prompt
    what = "an empty list" if prompt == [] else f"of type {type(prompt).__name__}"
    raise UserError(
        f"prompt {what}" if not (isinstance(prompt, list) and prompt) else "prompt",
        "must be text, a list of texts, a list of token ids, or a list of lists of token ids",
    )


_TEXT = {"type": "string", "pattern": "^[\\u2800-\\u28ff]*$"}
_IDS = {"type": "array", "items": {"type": "integer", "minimum": 0}}
_PROMPT_SCHEMA = {
    "anyOf": [
        _TEXT,
        {"type": "array", "minItems": 1, "items": _TEXT},
        _IDS | {"minItems": 1},
        {"type": "array", "minItems": 1, "items": _IDS},
    ],
    "description": "Strings are the bytes of a stream, one character U+2800 + byte each; they get BOS in "
    "front. Token ids are taken as they are.",
}


class Body(BaseModel):
    """What all bodies have in common."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    # Fields of other servers that are no fields here, with the values that change nothing.
    neutral: ClassVar[dict[str, tuple]] = {}

    @model_validator(mode="before")
    @classmethod
    def _nulls_and_foreign_fields(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        fields = {name: value for name, value in fields.items() if value is not None}
        for name, neutral in cls.neutral.items():
            if name in fields and fields[name] not in neutral:
                raise UserError(name, "is not supported", "leave it out")
        return fields


class Continuing(Body):
    """The settings that completions and pictures share."""

    model: Annotated[str | None, Field(description="A name from /v1/models")] = None
    n: Annotated[int, Field(ge=1, lt=2**31, description="Samples of each prompt")] = 1
    max_tokens: Annotated[
        Int32 | None, Field(description="New tokens a sample at most; by default to the end of the context")
    ] = None
    temperature: Annotated[float, Field(description="0 takes the likeliest token")] = 1.0
    top_k: Annotated[Int32, Field(description="Keep the k likeliest tokens; 0 or -1 keeps all")] = 0
    top_p: Annotated[
        float, Field(description="Of these, the likeliest that together reach this probability")
    ] = 1.0
    min_p: Annotated[float, Field(description="Keep tokens with this share of the likeliest one's")] = 0.0
    seed: Annotated[
        Seed | None, Field(description="The same seed gives the same samples; random by default")
    ] = None
    ignore_eos: Annotated[bool, Field(description="Go on after EOS")] = False
    constrain: Annotated[
        bool | None,
        Field(description="Let only tokens follow that can become a whole, valid file; so unless ignore_eos"),
    ] = None
    stream: Annotated[bool, Field(description="Send server-sent events while sampling")] = False


class StreamOptions(Body):
    """Of `POST /v1/completions`."""

    include_usage: Annotated[bool, Field(description="End with a chunk that counts tokens")] = False


class CompletionBody(Continuing):
    """The body of `POST /v1/completions`."""

    neutral: ClassVar = {
        "suffix": ("",),
        "logit_bias": ({},),
        "presence_penalty": (0,),
        "frequency_penalty": (0,),
        "repetition_penalty": (1,),
        "length_penalty": (1,),
        "use_beam_search": (False,),
        "min_tokens": (0,),
        "bad_words": ([],),
        "allowed_token_ids": ([],),
    }

    prompt: Annotated[Any, AfterValidator(_check_prompt), WithJsonSchema(_PROMPT_SCHEMA)]
    best_of: Annotated[int | None, Field(description="Must equal n")] = None
    stop: Annotated[
        str | list[str], Field(description="Ends a sample; not shown; characters as in prompt")
    ] = []
    stop_token_ids: Annotated[
        list[Int32], Field(max_length=1024, description="End a sample as EOS does")
    ] = []
    include_stop_str_in_output: Annotated[bool, Field(description="Show what ended a sample")] = False
    logprobs: Annotated[
        int | None, Field(ge=0, le=MAX_LOGPROBS, description="How many likeliest tokens to report")
    ] = None
    echo: Annotated[bool, Field(description="Put the prompt in front of each text")] = False
    stream_options: StreamOptions | None = None
    return_token_ids: Annotated[bool, Field(description="Add prompt_token_ids and token_ids")] = False
    return_removed: Annotated[
        bool, Field(description="Add removed, the probability that constrain took away from each token")
    ] = False
    return_image: Annotated[bool, Field(description="Add b64_json: the file of prompt and continuation")] = (
        False
    )

    @model_validator(mode="after")
    def _together(self) -> "CompletionBody":
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > MAX_STOPS or any(len(string) > MAX_STOP_LENGTH for string in stops):
            rule = f"must be at most {MAX_STOPS} strings of at most {MAX_STOP_LENGTH} characters"
            raise UserError("stop", rule, "use stop_token_ids")
        if self.best_of is not None and self.best_of != self.n:
            raise UserError(f"best_of {self.best_of}", f"must be n, which is {self.n}", "leave it out")
        if self.stream_options is not None and not self.stream:
            raise UserError("stream_options", "needs stream: true")
        if self.max_tokens is not None and self.max_tokens < (0 if self.echo else 1):
            rule = "must be at least 1" + ("" if self.echo else ", or 0 together with echo")
            raise UserError(f"max_tokens {self.max_tokens}", rule)
        return self


class ImageBody(Continuing):
    """The body of `POST /v1/images/generations`."""

    neutral: ClassVar = {"mask": (), "output_format": ("jpeg",), "background": ("opaque", "auto")}

    prompt: Annotated[
        Literal[""], Field(description="OpenAI's clients demand it; must be empty, the model knows no words")
    ] = ""
    size: Annotated[str, Field(description="auto, or the size of the codec, such as 256x256")] = "auto"
    response_format: Annotated[Literal["b64_json"], Field(description="Files in base64")] = "b64_json"
    partial_images: Annotated[
        int, Field(ge=0, le=256, description="While streaming, how many unfinished pictures to send of each")
    ] = 0


class EditFields(ImageBody):
    """The fields of `POST /v1/images/edits` beside the picture."""

    prompt_ratio: Annotated[
        float, Field(ge=0, le=1, description="Share of the picture that is given, from the top, in patches")
    ] = 0.5


class EditBody(EditFields):
    """The body of `POST /v1/images/edits` as JSON."""

    image: Annotated[str, Field(description="A picture file in base64, or a data: URL of one")]


class EditForm(EditFields):
    """The body of `POST /v1/images/edits` as multipart/form-data."""

    image: Annotated[
        Any, WithJsonSchema({"type": "string", "format": "binary", "description": "A picture file"})
    ]


class VideoBody(ImageBody):
    """The body of `POST /v1/videos/generations`."""

    partial_images: Annotated[Literal[0], Field(description="Clips are not shown while they are made")] = 0


class VideoEditFields(VideoBody):
    """The fields of `POST /v1/videos/edits` beside the clip."""

    prompt_frames: Annotated[
        Int32 | None, Field(ge=0, description="Frames of the clip that are given; by default two thirds")
    ] = None


class VideoEditBody(VideoEditFields):
    """The body of `POST /v1/videos/edits` as JSON."""

    video: Annotated[str, Field(description="A video file in base64, or a data: URL of one")]


class VideoEditForm(VideoEditFields):
    """The body of `POST /v1/videos/edits` as multipart/form-data."""

    video: Annotated[
        Any, WithJsonSchema({"type": "string", "format": "binary", "description": "A video file"})
    ]


class MegatronBody(Body):
    """The body of `PUT /api`, named as Megatron-LM names it."""

    neutral: ClassVar = {
        "top_p_decay": (0,),
        "top_p_bound": (0,),
        "stop_on_double_eol": (False,),
        "stop_on_eol": (False,),
        "prevent_newline_after_colon": (False,),
        "beam_width": (1,),
        "stop_token": (),
        "length_penalty": (1,),
        "sentences": (),
        "max_len": (),
    }

    prompts: Annotated[
        list[Annotated[str, WithJsonSchema(_TEXT)]],
        Field(min_length=1, max_length=128, description="Bytes as characters U+2800 + byte"),
    ]
    tokens_to_generate: Annotated[int, Field(ge=0, lt=2**31)] = 64
    logprobs: bool = False
    temperature: Annotated[float, Field(ge=0, le=100)] = 1.0
    top_k: Annotated[int, Field(ge=0, le=1000)] = 0
    top_p: Annotated[float, Field(ge=0, le=1, description="0 keeps all")] = 0.0
    random_seed: Annotated[int, Field(ge=-1, lt=2**63, description="-1 is random")] = -1
    add_BOS: Annotated[bool, Field(description="Put BOS in front of each prompt")] = False
    constrain: Annotated[
        bool | None, Field(description="Let only tokens follow that can become a whole, valid file")
    ] = None
