"""The H.264 streams of AVC-LM (Han et al., "JPEG-LM: LLMs as Image Generators with Canonical Codec
Representations", 2024, section 3 and appendix D).

A clip is 15 frames of 256x144 at 3 frames a second, in the baseline profile of H.264 at QP 37, with a slice
for every macroblock, as x264 writes it: a byte stream of NAL units (ITU-T H.264, annex B).

    codec = AvcCodec()
    stream = codec.encode("bikes.mp4")
    frames = codec.decode(stream)              # uint8 [15, 144, 256, 3]
    open("clip.mp4", "wb").write(codec.to_file(stream))

Needs PyAV: pip install 'megatron_codec[video]'.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np

from megatron_codec.codecs.avc_check import Layout, check_stream
from megatron_codec.codecs.avc_decoder import Concealment, decode_pictures, decode_reported, decode_rgb
from megatron_codec.codecs.avc_encoder import encode_h264, x264_version
from megatron_codec.codecs.avc_files import mux_mp4
from megatron_codec.codecs.avc_grammar import AvcGrammar
from megatron_codec.codecs.base import DecodeError, Report
from megatron_codec.codecs.nal import (
    PPS,
    SEI,
    SPS,
    nal_units,
    picture_starts,
    with_parameter_sets,
    without_units,
)
from megatron_codec.codecs.video import (
    MAX_PIXELS,
    Source,
    VideoError,
    array_frames,
    source_name,
    video_frames,
)
from megatron_codec.codecs.video_graph import Canvas, CanvasFrame
from megatron_codec.errors import UserError, out_of_range, raise_all

MACROBLOCK = 16  # pixels


@dataclass(frozen=True)
class AvcCodec:
    """Clips to H.264 byte streams and back.

    Args:
        frames: in a clip.
        fps: frames a second.
        width, height: of a frame in pixels, multiples of 16. Videos of another shape are padded with black.
        qp: x264's constant quantizer, 1 to 51.
        remove_head: leave out the parameter sets (SPS and PPS), which are the same for every clip, and splice
            them in again when a stream is decoded.
        paper_bytes: keep what ffmpeg writes with the paper's command: x264's SEI text, and the source's shape
            of pixels and colour space in the SPS, which then differs from clip to clip.

    Raises UserError for values that cannot be.
    """

    name: ClassVar[str] = "avc"
    file_suffix: ClassVar[str] = ".mp4"

    frames: int = 15
    fps: int = 3
    width: int = 256
    height: int = 144
    qp: int = 37
    remove_head: bool = False
    paper_bytes: bool = False

    def __post_init__(self) -> None:
        faults = list(out_of_range(self, 1, "frames", "fps"))
        for name in ("width", "height"):
            value = getattr(self, name)
            if value % MACROBLOCK or not 0 < value <= 4096:
                near = min(4096, max(MACROBLOCK, round(value / MACROBLOCK) * MACROBLOCK))
                rule = f"must be a multiple of {MACROBLOCK}, at most 4096"
                faults.append(UserError(f"{name} {value}", rule, f"use {near}"))
        if not 1 <= self.qp <= 51:
            faults.append(UserError(f"QP {self.qp}", "must lie between 1 and 51"))
        if self.remove_head and self.paper_bytes:
            rule = "cannot be removed from the paper's own bytes, in which it differs from clip to clip"
            faults.append(UserError("the head", rule, "give one of remove_head and paper_bytes"))
        raise_all(faults)

    @property
    def canvas(self) -> Canvas:
        """What videos are brought to before they are encoded."""
        return Canvas(self.width, self.height, self.fps)

    @property
    def num_macroblocks(self) -> int:
        """Macroblocks of 16x16 pixels in a frame; each is one slice of the stream."""
        return self.width * self.height // MACROBLOCK**2

    @cached_property
    def head(self) -> bytes:
        """The parameter sets with their start codes, SPS and PPS: what every stream begins with unless it is
        removed, and what comes again before a scene that x264 begins anew."""
        stream = self._black
        units = [unit for unit in nal_units(stream) if unit.type in (SPS, PPS)]
        return b"".join(stream[unit.start : unit.end] for unit in units)

    @property
    def x264_version(self) -> str:
        """Of the encoder, which decides the bytes."""
        return x264_version(self._black)

    @cached_property
    def _black(self) -> bytes:
        """A single black frame, as x264 writes it."""
        black = np.zeros((1, self.height, self.width, 3), np.uint8)
        return encode_h264(list(array_frames(black, self.canvas)), self.canvas, self.qp)

    @property
    def preamble(self) -> bytes:
        """The head, or nothing where streams are without it or have heads of their own."""
        return b"" if self.remove_head or self.paper_bytes else self.head

    def encode(self, media: Source | np.ndarray, pad_short: bool = False) -> bytes:
        """The stream of a clip.

        Args:
            media: a path, a binary file that can seek, of whose video the first `frames / fps` seconds are
                taken; or uint8 [n, height, width, 3], n frames of the codec's rate.
            pad_short: repeat the last frame of what is too short, instead of refusing it. A single frame is
                refused all the same.

        Raises VideoError for what cannot be used, UserError for an array of another shape or type.
        """
        return next(self.encode_clips(media, pad_short=pad_short))

    def encode_clips(
        self,
        media: Source | np.ndarray,
        clips: int | None = 1,
        stride: float | None = None,
        pad_short: bool = False,
        max_pixels: int = MAX_PIXELS,
    ) -> Iterator[bytes]:
        """The streams of clips of a video, as they are read. The first begins with the video.

        Args:
            clips: at most so many, None for all. Behind the first there are none that are too short.
            stride: seconds from the beginning of a clip to that of the next, rounded to a frame; by default
                the length of a clip.
            max_pixels: see `video_frames`.

        Raises as `encode` does.
        """
        step = self.frames if stride is None else round(stride * self.fps)
        if step < 1:
            rule = f"must be at least one frame, {1 / self.fps:.3g} seconds"
            raise UserError(f"stride {stride}", rule)
        if isinstance(media, np.ndarray):
            name, source = "the clip", array_frames(media, self.canvas)
        else:
            name, source = source_name(media), video_frames(media, self.canvas, max_pixels)
        window: list[CanvasFrame] = []
        count = 0
        while count != clips:
            window += islice(source, self.frames - len(window))
            if len(window) < self.frames:
                break
            yield self._encode(window)
            count += 1
            if count != clips and step > self.frames:
                next(islice(source, step - self.frames - 1, None), None)
            window = window[step:]
        if count == 0:
            if len(window) < 2 or not pad_short:
                raise self._too_short(name, len(window))
            yield self._encode(window + window[-1:] * (self.frames - len(window)))

    def decode(self, stream: bytes) -> np.ndarray:
        """The frames, uint8 [frames, height, width, 3] in RGB; what is missing is made up.

        Macroblocks that are missing or damaged are made up by FFmpeg's decoder from those around them and
        from the frame before; frames that are missing at the end repeat the last. Surplus ones are cut off.

        Raises DecodeError if not a single frame can be had.
        """
        frames = np.empty((self.frames, self.height, self.width, 3), np.uint8)
        count = decode_rgb(self.to_h264(stream), frames)
        if count == 0:
            rule = f"holds no frame of {self.width}x{self.height} pixels that can be decoded"
            raise DecodeError(f"stream of {len(stream)} bytes", rule)
        frames[count:] = frames[count - 1]
        return frames

    def decode_reported(self, stream: bytes) -> tuple[np.ndarray, Concealment]:
        """The frames as `decode` gives them, and what of them was made up. Slower: it decodes twice."""
        frames = self.decode(stream)
        return frames, decode_reported(
            self.to_h264(stream), self.frames, (self.width, self.height), self.num_macroblocks
        )

    def to_h264(self, stream: bytes) -> bytes:
        """The stream as a raw .h264 file has it. Parameter sets are put where they belong, whatever the
        stream has of them, and anything else but slices is left out; `paper_bytes` stay as they are."""
        if self.paper_bytes:
            return stream
        return with_parameter_sets(stream, self.head)

    def to_file(self, stream: bytes) -> bytes:
        """The content of an .mp4 file, which holds the very slices of a sound stream.

        Players differ in what they make of damage, so a stream that has some is decoded, and the frames are
        encoded anew. Raises DecodeError.
        """
        h264 = self.to_h264(stream)
        if not self.check(stream).valid or any(picture.is_corrupt for picture in decode_pictures(h264)):
            plain = AvcCodec(**asdict(self) | {"remove_head": False, "paper_bytes": False})
            h264 = plain.encode(self.decode(stream))
        return mux_mp4(h264, self.fps)

    def prompt_frames(self, ratio: float) -> int:
        """How many whole frames `prompt` keeps at this ratio."""
        if not 0 <= ratio <= 1:
            raise UserError(f"prompt ratio {ratio}", "must lie between 0 and 1")
        return int(self.frames * ratio + 1e-9)

    def prompt(self, stream: bytes, ratio: float) -> bytes:
        """The prefix with the first `prompt_frames(ratio)` frames; see `first_frames`."""
        return self.first_frames(stream, self.prompt_frames(ratio))

    def first_frames(self, stream: bytes, count: int) -> bytes:
        """The prefix with so many frames, cut where the next one begins: before its first slice, or before
        the parameter sets in front of that. No frames are the preamble, all are the stream.
        """
        if count <= 0:
            return stream[: len(self.preamble)]
        starts = picture_starts(stream)
        return stream[: starts[count]] if count < len(starts) else stream

    def whole_frames(self, stream: bytes) -> tuple[int, bytes]:
        """How many frames of an unfinished stream are complete, and the prefix that ends with the last of
        them."""
        starts = picture_starts(stream)
        if not starts:
            return 0, stream[: len(self.preamble)]
        return len(starts) - 1, stream[: starts[-1]]

    def check(self, stream: bytes) -> Report:
        """Whether the NAL units are, to the byte, those of a complete clip: start codes and their lengths,
        emulation prevention, parameter sets, order and headers of the slices, number of frames.

        The coded macroblocks within the slices are not looked into.
        """
        return check_stream(stream, self.layout)

    def grammar(
        self, tokens: Sequence[bytes], canonical: bool = False, in_range: bool = False
    ) -> AvcGrammar | None:
        """What can follow token by token in this codec's streams; None for `paper_bytes`, whose heads differ
        from clip to clip.

        Args:
            canonical, in_range: narrower grammars that only pictures have; here they change nothing.
        """
        return None if self.paper_bytes else AvcGrammar(self.layout, tokens)

    @property
    def layout(self) -> Layout:
        """What `check` and `grammar` hold streams to."""
        return Layout(
            self.frames,
            (self.width // MACROBLOCK, self.height // MACROBLOCK),
            b"" if self.paper_bytes else self.head,
            self.remove_head,
        )

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for `get_codec`."""
        return {"name": self.name, "settings": asdict(self)}

    def _encode(self, frames: list[CanvasFrame]) -> bytes:
        stream = encode_h264(frames, self.canvas, self.qp, self.paper_bytes)
        if self.paper_bytes:
            return stream
        return without_units(stream, (SEI, SPS, PPS) if self.remove_head else (SEI,))

    def _too_short(self, name: str, found: int) -> VideoError:
        if found < 2:
            rule = f"is a still picture, or shorter than two frames at {self.fps} a second"
            return VideoError("still picture", name, rule)
        rule = f"has {found} frames at {self.fps} a second, and a clip has {self.frames}"
        return VideoError("too short", name, rule, "pad_short repeats the last frame")
