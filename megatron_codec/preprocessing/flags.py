"""Flags that all tools which read pictures have in common, and those of the tools that read videos."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from megatron_codec.codecs import AvcCodec, ImageCodec, JpegCodec, get_codec
from megatron_codec.codecs.images import Geometry, Method, Resample
from megatron_codec.codecs.video import MAX_PIXELS as MAX_VIDEO_PIXELS
from megatron_codec.errors import UserError, collecting, raise_all
from megatron_codec.preprocessing.decoders import MAX_PIXELS, Decoder, PillowDecoder
from megatron_codec.preprocessing.encoder import Encoder
from megatron_codec.preprocessing.pictures import PictureEncoder
from megatron_codec.preprocessing.videos import VideoEncoder
from megatron_codec.tokenizer import Tokenizer


def picture_codec(flag: str, tokenizer: Path) -> ImageCodec:
    """The codec of pictures that a tokenizer was made for.

    Args:
        flag: that names it, for messages.

    Raises:
        UserError: it cannot be read, was made for no codec, or for one of clips.
    """
    described = Tokenizer.load(tokenizer).codec
    if described is None:
        raise UserError(f"{flag} {tokenizer}", "was made for no codec", "make one with its codec's tool")
    codec = get_codec(described["name"], described["settings"])
    if not hasattr(codec, "image_size"):
        rule = f"is for the codec '{codec.name}', which is none of pictures"
        raise UserError(f"{flag} {tokenizer}", rule, "give one that is; clips have tools/preprocess_avc.py")
    return cast(ImageCodec, codec)


@dataclass(frozen=True, kw_only=True)
class InputFlags:
    """Which pictures or videos are read."""

    input: tuple[Path, ...]
    """Folders (searched recursively), files, lists (.txt, a path a line), tar files, and of pictures also
    arrays (idx, .npy, .npz)."""
    subset: Literal["all", "train", "test"] = "all"
    """Which of them: all, all but the held-out ones, or the held-out ones."""
    hold_out: float = 0.0
    """Share held out for the subset "test"; a hash of the name decides."""

    def encoder(self) -> Encoder:
        """What these flags say of how items become streams. Raises UserError for a value that is refused."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PictureInputFlags(InputFlags):
    """Which pictures are read, and how they become square."""

    geometry: Method = "crop"
    """crop: resize the largest centred square. random-crop: a square at a random place. pad: shrink to fit,
    never enlarge, centre on black."""
    resample: Resample = "bicubic"
    """Filter for resizing."""
    seed: int = 0
    """Of the random crops; with a picture's name it decides its crop."""
    min_crop: float = 1.0
    """Least side of a random crop, as a share of the picture's shorter side."""
    scaled_decode: bool = True
    """Let libjpeg decode JPEG files at 1/2, 1/4 or 1/8 of their size where that leaves enough pixels."""
    max_pixels: int = MAX_PIXELS
    """Skip pictures with more pixels than this, in width times height."""
    decoder: Literal["pillow", "dali"] = "pillow"
    """pillow, or NVIDIA DALI (pip install 'megatron_codec[dali]') for JPEG files, which decodes them
    whole."""
    dali_device: Literal["cpu", "gpu"] = "cpu"
    """Where DALI decodes."""

    def encoder_of(self, codec: ImageCodec) -> PictureEncoder:
        """An encoder of this codec. Raises UserError for a value that is refused."""
        geometry = Geometry(self.geometry, self.resample, self.seed, self.min_crop)
        if self.max_pixels < 1:
            raise UserError(f"--max-pixels {self.max_pixels}", "must be at least 1")
        decoder: Decoder = PillowDecoder(self.max_pixels, self.scaled_decode)
        if self.decoder == "dali":
            from megatron_codec.preprocessing.dali import DaliDecoder

            decoder = DaliDecoder(self.dali_device, self.max_pixels)
        return PictureEncoder(codec, geometry, decoder)


@dataclass(frozen=True, kw_only=True)
class PictureFlags(PictureInputFlags):
    """Which pictures are read, and how they become JPEG streams."""

    image_size: int = 256
    """Side of the square pictures in pixels, a multiple of 16."""
    quality: int = 25
    """JPEG quality, 1 to 100."""
    remove_head: bool = False
    """Leave out the constant head of every stream as well; worth it for small pictures."""
    restart_interval: int = 1
    """Patches of 16x16 pixels between restart markers, 0 for none; the paper has one after every patch."""

    def encoder(self) -> PictureEncoder:
        """See `InputFlags`."""
        return self.encoder_of(
            JpegCodec(self.image_size, self.quality, self.remove_head, self.restart_interval)
        )


@dataclass(frozen=True, kw_only=True)
class VideoFlags(InputFlags):
    """Which videos are read, and how their clips become streams."""

    size: str = "256x144"
    """WIDTHxHEIGHT of a frame in pixels, multiples of 16; videos of another shape are padded with black."""
    frames: int = 15
    """Frames of a clip."""
    fps: int = 3
    """Frames a second."""
    qp: int = 37
    """Quantizer of H.264, 1 to 51."""
    remove_head: bool = False
    """Leave out the parameter sets, which are the same for every clip."""
    paper_bytes: bool = False
    """Keep x264's own SEI text, and the source's shape of pixels and colour space, as ffmpeg does."""
    clips_per_video: int = 1
    """At most so many clips of a video, from its beginning; 0 for all."""
    stride: float | None = None
    """Seconds from the beginning of a clip to that of the next; by default the length of a clip."""
    pad_short: bool = False
    """Repeat the last frame of videos that are too short, instead of skipping them."""
    max_pixels: int = MAX_VIDEO_PIXELS
    """Skip videos with more pixels a frame than this, in width times height."""

    def encoder(self) -> VideoEncoder:
        """See `InputFlags`."""
        faults: list[UserError] = []
        with collecting(faults):
            width, height = parse_size(self.size)
            codec = AvcCodec(
                self.frames, self.fps, width, height, self.qp, self.remove_head, self.paper_bytes
            )
        if self.clips_per_video < 0:
            rule = "must be at least 1, or 0 for all"
            faults.append(UserError(f"--clips-per-video {self.clips_per_video}", rule))
        if self.stride is not None and not 1 <= self.stride * self.fps < float("inf"):
            rule = f"must be at least a frame, {1 / max(1, self.fps):.3g} seconds"
            faults.append(UserError(f"--stride {self.stride}", rule, "leave it out for the length of a clip"))
        elif self.stride is not None and self.clips_per_video == 1:
            rule = "has no meaning for a single clip of each video"
            faults.append(UserError(f"--stride {self.stride}", rule, "give --clips-per-video"))
        if self.max_pixels < 1:
            faults.append(UserError(f"--max-pixels {self.max_pixels}", "must be at least 1"))
        raise_all(faults)
        return VideoEncoder(codec, self.clips_per_video or None, self.stride, self.pad_short, self.max_pixels)


def parse_size(text: str) -> tuple[int, int]:
    """(width, height) of "256x144"."""
    width, _, height = text.partition("x")
    if not (width.isdecimal() and height.isdecimal()):
        raise UserError(f"--size {text}", "must be WIDTHxHEIGHT in pixels", "for instance 256x144")
    return int(width), int(height)
