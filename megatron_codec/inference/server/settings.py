"""The command line of the server; every field is a flag."""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import tyro

from megatron_codec.errors import UserError, out_of_range
from megatron_codec.inference.config import EngineConfig

API_KEY_VARIABLE = "MEGATRON_CODEC_API_KEY"


@dataclass(frozen=True)
class ServerConfig:
    """Serves completions and pictures over HTTP."""

    load: Path
    """Folder of checkpoints, the --save of tools/pretrain.py; it is enough by itself."""
    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0 for all (give an API key then)."""
    port: int = 5000
    """Port to listen on; 0 takes a free one and says which."""
    api_key: str | None = None
    """What clients have to send as `Authorization: Bearer KEY`; MEGATRON_CODEC_API_KEY keeps it off the
    command line, which other users of the machine can read."""
    served_model_name: tuple[str, ...] = ()
    """Names that requests may call the model by, the first one in replies. The name of the folder and that of
    the codec with `lm` (jpeglm) are known anyway."""
    max_body_bytes: int = 16 * 2**20
    """The largest body of a request."""
    max_n: int = 256
    """The most samples of one request, all its prompts together."""
    max_tokens: int | None = None
    """The most new tokens a sample may ask for; by default as many as the context holds."""
    max_requests: int = 1024
    """Prompts that may be open at once, waiting ones included; more are refused with 429."""
    request_seconds: float = 600.0
    """The longest that a request may take, reading it included."""
    max_upload_pixels: int = 50_000_000
    """The most pixels of an uploaded picture."""
    picture_seconds: float = 300.0
    """How long a finished picture is kept under its id."""
    grace_seconds: float = 30.0
    """After SIGTERM, how long running requests may go on."""
    engine: tyro.conf.OmitArgPrefixes[EngineConfig] = field(default_factory=EngineConfig)
    """What computes the tokens."""

    @property
    def key(self) -> str | None:
        """The API key, of the command line or else of the environment."""
        return self.api_key or os.environ.get(API_KEY_VARIABLE) or None

    def faults(self) -> Iterator[UserError]:
        """Values that cannot be."""
        yield from out_of_range(self, 0, "port", below=65536)
        yield from out_of_range(self, 1, "max_body_bytes", "max_n", "max_tokens", "max_requests")
        yield from out_of_range(self, 1, "max_upload_pixels")
        yield from out_of_range(self, 0, "request_seconds", "picture_seconds", "grace_seconds")
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            yield UserError("--api-key", "must be printable ASCII, to fit into a header")
