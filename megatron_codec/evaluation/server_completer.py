"""Completions by a running server of ours: what its clients get, over HTTP."""

import base64
import io
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, cast

import numpy as np
import requests
from PIL import Image
from requests.adapters import HTTPAdapter
from urllib3 import Retry

from megatron_codec.codecs import ImageCodec, get_codec
from megatron_codec.errors import UserError
from megatron_codec.evaluation.completers import Progress, row_name
from megatron_codec.evaluation.originals import Originals
from megatron_codec.evaluation.samples import BROKEN, Sample, file_sizes, stored_bytes
from megatron_codec.evaluation.upscaling import Upscaler
from megatron_codec.inference import Sampling
from megatron_codec.inference.server.settings import API_KEY_VARIABLE

REQUESTS = 16  # at a time: the server's engine works on them together
SECONDS = 3600  # without a byte of an answer


class RunningServer:
    """A server of ours, asked what model it has.

    Raises:
        UserError: nobody answers there, it refuses, or its model makes no pictures.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._sessions = threading.local()
        listed = self.ask("GET", "/v1/models")
        try:
            self.model: dict[str, Any] = listed["data"][0]
            described = self.model["codec"]
        except (KeyError, IndexError, TypeError) as error:
            remedy = "give the address of tools/run_text_generation_server.py"
            raise UserError(f"--server {url}", "is no server of megatron_codec", remedy) from error
        codec = get_codec(described["name"], described["settings"])
        if not hasattr(codec, "image_size"):
            rule = f"has a model of the codec '{codec.name}', and pictures are compared here"
            raise UserError(f"--server {url}", rule, "give one whose model makes pictures")
        self.codec = cast(ImageCodec, codec)

    @property
    def name(self) -> str:
        """What the tables call it."""
        return self.model["id"]

    def ask(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """What the server answers, JSON.

        Raises:
            UserError: nobody answers, or it refuses.
        """
        session = self._session()
        key = os.environ.get(API_KEY_VARIABLE)
        headers = {"authorization": f"Bearer {key}"} if key else {}
        where = f"--server {self.url}"
        try:
            reply = session.request(
                method, self.url + path, json=body, headers=headers, timeout=(10, SECONDS)
            )
        except requests.RequestException as error:
            remedy = "start tools/run_text_generation_server.py, then the same command again"
            raise UserError(where, f"does not answer: {error}", remedy) from error
        if reply.status_code != 200:
            remedy = f"set {API_KEY_VARIABLE} to its key" if reply.status_code == 401 else ""
            rule = f"{path} is refused with status {reply.status_code}: {reply.text[:300]}"
            raise UserError(where, rule, remedy)
        try:
            return reply.json()
        except requests.JSONDecodeError as error:
            raise UserError(where, f"{path} does not answer with JSON", "is it another program?") from error

    def _session(self) -> requests.Session:
        """This thread's; it waits where the server is full."""
        if not hasattr(self._sessions, "session"):
            full = Retry(8, connect=0, read=0, status_forcelist=(429, 503), allowed_methods=None)
            self._sessions.session = requests.Session()
            for scheme in ("http://", "https://"):
                self._sessions.session.mount(scheme, HTTPAdapter(max_retries=full))
        return self._sessions.session


@dataclass(frozen=True)
class ServerCompleter:
    """The model of a running server with sampling settings, whose `seed` and `n` are of no account.

    A set is made anew where the server has another model (one of another name, codec or time of writing) or
    computes it with other settings, as far as it says them.
    """

    server: RunningServer
    sampling: Sampling
    upscaler: Upscaler = field(default_factory=Upscaler)

    @property
    def name(self) -> str:
        """See `Completer`."""
        return row_name(f"server ({self.server.name})", self.sampling)

    @property
    def is_random(self) -> bool:
        """See `Completer`."""
        return self.sampling.temperature > 0 or self.upscaler.is_random

    @cached_property
    def _fields(self) -> dict[str, Any]:
        settings = asdict(self.sampling)
        fields = {name: settings[name] for name in ("temperature", "top_k", "top_p", "min_p")}
        return fields | {"constrain": self.sampling.constrained}

    def identity(self, ratio: float, seed: int) -> dict[str, Any]:
        """See `Completer`."""
        said = self.server.model
        model = {name: said[name] for name in ("id", "created", "codec", "num_tokens")}
        # The names of `Checkpoint.identity`. Servers of before do not say them.
        engine = {
            name: said[name] for name in ("dtype", "weight_dtype", "canonical", "in_range") if name in said
        }
        decides = {"server_model": model, "engine": engine, "sampling": self._fields}
        return decides | self.upscaler.identity | {"ratio": ratio, "seed": seed}

    def release(self) -> None:
        """See `Completer`."""
        self.upscaler.release()

    def complete(
        self, originals: Originals, numbers: range, ratio: float, seed: int, progress: Progress
    ) -> list[Sample]:
        """See `Completer`. Each picture has a seed of its own.

        Raises:
            UserError: the server does not answer, or refuses.
        """
        streams = originals.streams(self.server.codec)

        def one(number: int) -> Sample:
            body = self._fields | {"seed": (seed << 32) + number, "model": self.server.name}
            if ratio > 0:
                buffer = io.BytesIO()
                Image.fromarray(originals.pictures[number]).save(buffer, "PNG")
                picture = base64.b64encode(buffer.getvalue()).decode()
                reply = self.server.ask(
                    "POST", "/v1/images/edits", body | {"image": picture, "prompt_ratio": ratio}
                )
            else:
                reply = self.server.ask("POST", "/v1/images/generations", body)
            made = self._sample(reply["data"][0], streams[number], originals.image_size, body["seed"])
            progress(1)
            return made

        with ThreadPoolExecutor(REQUESTS) as threads:
            waiting = [threads.submit(one, number) for number in numbers]
            try:
                return [made.result() for made in waiting]
            except BaseException:
                threads.shutdown(wait=False, cancel_futures=True)
                raise

    def _sample(self, item: dict[str, Any], real: bytes, image_size: int, seed: int) -> Sample:
        codec = self.server.codec
        known = {
            "bytes": stored_bytes(codec, item["bytes"]),
            "real_bytes": stored_bytes(codec, len(real)),
            "valid": item["valid"],
            "decodes": True,
            "new_tokens": item["new_tokens"],
            "redrawn_tokens": item["redrawn"],
            "mean_removed": item["removed"],
        }
        content = base64.b64decode(item["b64_json"] or "")
        try:
            with Image.open(io.BytesIO(content)) as picture:
                picture.load()
                known |= file_sizes(codec, content, real)
                if picture.width == image_size:
                    return Sample(content, codec.file_suffix, known)
                larger = self.upscaler(picture.convert("RGB"), image_size, seed)
        except OSError:
            return Sample(content, BROKEN, known | {"decodes": False})
        made = Sample.of_pixels(np.asarray(larger))
        return Sample(made.content, made.suffix, known)
