"""The pictures of a VQ transformer (Esser et al., "Taming Transformers for High-Resolution Image Synthesis",
2021): a convolutional network turns a picture into a small grid of codebook entries, read row by row.

The network is a `VQModel` of the library `diffusers`, from a folder that its `save_pretrained` wrote;
`tools/train_vq.py` trains one. Weights are too large for a setting: the codec names their folder and their
SHA-256, and refuses others.

    codec = VqCodec.of("vq", image_size=32)
    stream = codec.encode(Image.open("cat.png"))        # 2 bytes a code

Codes are what the network computes in 32-bit floating point: pixels that lie between two entries may get
another one on another kind of processor.
"""

import hashlib
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from megatron_codec.codecs import codes
from megatron_codec.codecs.base import DecodeError, Report
from megatron_codec.codecs.images import canonical
from megatron_codec.errors import UserError, raise_all

WEIGHTS = "diffusion_pytorch_model.safetensors"
_GREY = 128  # of the patches that a stream lacks


@dataclass(frozen=True)
class VqCodec:
    """Pictures to codebook entries and back. Needs torch and diffusers where it encodes or decodes.

    Args:
        image_size: side of the square picture in pixels.
        side: of the grid of codes; `image_size` is a multiple of it.
        num_codes: entries of the codebook.
        folder: of the network.
        sha256: of its weights.

    `VqCodec.of` finds out all of these from the folder. Raises UserError for settings that do not fit.
    """

    name: ClassVar[str] = "vq"
    file_suffix: ClassVar[str] = ".png"

    image_size: int = 32
    side: int = 8
    num_codes: int = 512
    folder: str = ""
    sha256: str = ""

    def __post_init__(self) -> None:
        faults = []
        if self.side < 1 or self.image_size < 1 or self.image_size % self.side:
            rule = f"must be a multiple of the side of the grid, {self.side}"
            faults.append(UserError(f"image size {self.image_size}", rule))
        if not 2 <= self.num_codes <= codes.MAX_CODES:
            faults.append(UserError(f"{self.num_codes} codes", f"must be 2 to {codes.MAX_CODES}"))
        raise_all(faults)

    @classmethod
    def of(cls, folder: str | Path, image_size: int) -> "VqCodec":
        """The codec of a network's folder. Raises UserError where there is none in it, or the size does not
        fit."""
        path = Path(folder)
        try:
            config = json.loads((path / "config.json").read_bytes())
            factor = 2 ** (len(config["block_out_channels"]) - 1)
            num_codes = int(config["num_vq_embeddings"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            remedy = "train one with tools/train_vq.py, or give what diffusers' VQModel.save_pretrained wrote"
            raise UserError(f"{path}", f"holds no VQModel ({error})", remedy) from error
        if image_size < 1 or image_size % factor:
            near = max(factor, image_size // factor * factor)
            rule = f"must be a multiple of {factor}, by which the network in {path} shrinks pictures"
            raise UserError(f"image size {image_size}", rule, f"use {near}")
        return cls(image_size, image_size // factor, num_codes, str(path), _hash_of(path / WEIGHTS))

    @property
    def merges(self) -> list[tuple[int, int]]:
        """Of the vocabulary in which each code is one token."""
        return codes.merges(self.num_codes)

    @property
    def preamble(self) -> bytes:
        """Nothing."""
        return b""

    def encode(self, media: Image.Image | np.ndarray) -> bytes:
        """The codebook entries nearest to what the network makes of a Pillow image or a uint8 array
        [height, width] or [height, width, 3]; other modes and sizes are made canonical first."""
        import torch

        pixels = np.asarray(canonical(media, self.image_size))
        values = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 127.5 - 1
        with torch.inference_mode():
            indices = self._network.quantize(self._network.encode(values).latents)[2][2]
        return codes.to_stream(indices.numpy())

    def decode(self, stream: bytes) -> Image.Image:
        """The RGB picture; patches whose code a stream lacks are grey. Raises DecodeError for a stream that
        does not begin with a code."""
        import torch

        length = self.side**2
        found = codes.from_stream(stream, self.num_codes)[:length]
        if len(stream) and not len(found):
            raise DecodeError(f"stream of {len(stream)} bytes", "does not begin with a code of the codebook")
        # The network sees the whole grid: what is lacking repeats what is there, which changes that least.
        indices = torch.from_numpy(np.resize(found, length) if len(found) else np.zeros(length, found.dtype))
        network = self._network
        with torch.inference_mode():
            entries = (
                network.quantize.embedding(indices).view(1, self.side, self.side, -1).permute(0, 3, 1, 2)
            )
            guide = entries if network.config.norm_type == "spatial" else None
            values = network.decoder(network.post_quant_conv(entries), guide)[0]
        pixels = ((values.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()
        patch = self.image_size // self.side
        lacking = (np.arange(length) >= len(found)).reshape(self.side, self.side)
        pixels[lacking.repeat(patch, 0).repeat(patch, 1)] = _GREY
        return Image.fromarray(pixels)

    def prompt(self, stream: bytes, ratio: float) -> bytes:
        """The first rows of codes, the share `ratio` of them, rounded down."""
        if not 0 <= ratio <= 1:
            raise UserError(f"prompt ratio {ratio}", "must lie between 0 and 1")
        return stream[: 2 * self.side * int(self.side * ratio)]

    def check(self, stream: bytes) -> Report:
        """Whether the stream is a code for every place of the grid and nothing else."""
        return codes.check(stream, self.side**2, self.num_codes)

    def grammar(
        self, tokens: Sequence[bytes], canonical: bool = False, in_range: bool = False
    ) -> codes.CodeGrammar:
        """See `codecs.base.Grammar`; `canonical` and `in_range` change nothing."""
        del canonical, in_range
        return codes.CodeGrammar(tokens, self.side**2, self.num_codes)

    def to_file(self, stream: bytes) -> bytes:
        """The content of a .png file. Raises DecodeError."""
        buffer = io.BytesIO()
        self.decode(stream).save(buffer, format="PNG")
        return buffer.getvalue()

    def stored_bytes(self, length: int) -> float:
        """See `ImageCodec`."""
        return codes.stored_bytes(length, self.num_codes)

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for `get_codec`."""
        return {"name": self.name, "settings": asdict(self)}

    @cached_property
    def _network(self) -> Any:
        found = _hash_of(Path(self.folder) / WEIGHTS)
        if found != self.sha256:
            raise UserError(
                f"{Path(self.folder) / WEIGHTS}",
                f"is another file than the codec was made with: its SHA-256 is {found[:12]}..., "
                f"not {self.sha256[:12]}...",
                "put back the network that the dataset and the checkpoint were made with",
            )
        try:
            from diffusers.models.autoencoders.vq_model import VQModel
        except ImportError as error:
            remedy = "pip install 'megatron_codec[eval]'"
            raise UserError("diffusers", "is needed for the codec 'vq' and not installed", remedy) from error
        return VQModel.from_pretrained(self.folder, local_files_only=True, low_cpu_mem_usage=False).eval()


def _hash_of(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        remedy = "the codec 'vq' needs the folder of its network at this place; copy it there"
        raise UserError(f"{path}", f"cannot be read: {error.strerror}", remedy) from error
