"""The JPEG streams of JPEG-LM (Han et al., "JPEG-LM: LLMs as Image Generators with Canonical Codec
Representations", 2024, section 3 and its public script).

A picture is baseline JPEG, 4:2:0, with a restart marker after every MCU (a 16x16 patch), in the abbreviated
format of ITU-T T.81 annex B.5: quantization and Huffman tables, which are the same for every picture, are
left out and spliced in again when a stream is decoded.

    codec = JpegCodec(image_size=256, quality=25)
    stream = codec.encode(Image.open("cat.png"))
    codec.decode(stream).show()
"""

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import islice
from typing import Any, ClassVar

import numpy as np
from PIL import Image

from megatron_codec._csrc import JpegScan
from megatron_codec.codecs.base import DecodeError, Report
from megatron_codec.codecs.images import canonical
from megatron_codec.codecs.jpeg_format import Format, check_scan, parse
from megatron_codec.codecs.jpeg_grammar import JpegGrammar
from megatron_codec.errors import UserError, raise_all

MCU_SIZE = 16
_START_OF_SCAN = 0xDA
_END_OF_IMAGE = b"\xff\xd9"
_RESTART_MARKER = re.compile(rb"\xff[\xd0-\xd7]")
# What ends a scan: any marker but RSTn. FFFF is fill (T.81 B.1.1.2), FF00 a data byte.
_SCAN_END = re.compile(rb"\xff[^\x00\xff\xd0-\xd7]")

# Pillow's numbers for what a JPEG datastream contains.
_WHOLE_FILE, _TABLES_ONLY, _WITHOUT_TABLES = 0, 1, 2


@dataclass(frozen=True)
class JpegCodec:
    """Pictures to abbreviated JPEG streams and back.

    Args:
        image_size: side of the square picture in pixels, a multiple of 16.
        quality: libjpeg's quality, 1 to 100.
        remove_head: also leave out the constant head (SOI to the end of the scan header). Worth it for small
            pictures, of which the head is a large part; the paper keeps it.
        restart_interval: MCUs between restart markers, 0 for none. The paper has a marker after every MCU,
            where a decoder, and a model, finds the beginning of a byte again.
    """

    name: ClassVar[str] = "jpeg"
    file_suffix: ClassVar[str] = ".jpg"

    image_size: int = 256
    quality: int = 25
    remove_head: bool = False
    restart_interval: int = 1

    def __post_init__(self) -> None:
        faults = []
        if self.image_size % MCU_SIZE or not 0 < self.image_size < 65536:
            near = min(65520, max(MCU_SIZE, round(self.image_size / MCU_SIZE) * MCU_SIZE))
            rule = f"must be a multiple of {MCU_SIZE}, below 65536"
            faults.append(UserError(f"image size {self.image_size}", rule, f"use {near}"))
        if not 1 <= self.quality <= 100:
            faults.append(UserError(f"quality {self.quality}", "must lie between 1 and 100"))
        if not 0 <= self.restart_interval < 65536:
            rule = "must lie between 0 (no markers) and 65535 MCUs"
            faults.append(
                UserError(f"restart interval {self.restart_interval}", rule, "use 1, as the paper does")
            )
        raise_all(faults)

    @property
    def num_patches(self) -> int:
        """MCUs of 16x16 pixels in a picture."""
        return (self.image_size // MCU_SIZE) ** 2

    @cached_property
    def tables(self) -> bytes:
        """The tables-only file (SOI, DQT, DHT, EOI) that every stream shares."""
        return self._save(self._blank(), _TABLES_ONLY)

    @cached_property
    def head(self) -> bytes:
        """What every stream begins with: SOI, APP0, SOF0, DRI and scan header; 59 bytes, 53 without DRI."""
        return _head_of(self._save(self._blank(), _WITHOUT_TABLES))

    @property
    def preamble(self) -> bytes:
        """The head, or nothing where the streams are without it."""
        return b"" if self.remove_head else self.head

    @cached_property
    def file_head(self) -> bytes:
        """What every standalone file begins with: the head with the tables in their places."""
        return _head_of(self._save(self._blank(), _WHOLE_FILE))

    def encode(self, media: Image.Image | np.ndarray) -> bytes:
        """The stream of a Pillow image or a uint8 array [height, width] or [height, width, 3].

        A picture of another mode, orientation or size is made canonical first (`images.canonical`, centre
        crop). Metadata has no influence.
        """
        stream = self._save(canonical(media, self.image_size), _WITHOUT_TABLES)
        return stream[len(self.head) :] if self.remove_head else stream

    def decode(self, stream: bytes) -> Image.Image:
        """The RGB picture that `to_file` stores; patches that a stream lacks are grey. Raises DecodeError."""
        file = self.to_file(stream)
        try:
            picture = Image.open(io.BytesIO(file), formats=["JPEG"])
            picture.load()
        except (OSError, SyntaxError, ValueError) as error:
            raise DecodeError(f"stream of {len(stream)} bytes", f"does not decode: {error}") from error
        return picture

    def to_file(self, stream: bytes) -> bytes:
        """A standalone .jpg file that opens in any viewer; for a complete stream, byte for byte Pillow's.

        A truncated stream is closed with EOI, and a damaged one before the first marker that does not
        belong into a scan. Whether a stream was sound is for `check` to say.

        Raises DecodeError if the stream does not begin with the codec's head (or with a part of it).
        """
        if not (stream.startswith(self.preamble) or self.preamble.startswith(stream)):
            raise DecodeError(f"stream of {len(stream)} bytes", f"must begin with the head of {self}")
        payload = stream[len(self.preamble) :]
        end = _SCAN_END.search(payload)
        return self.file_head + payload[: end.start() if end else None] + _END_OF_IMAGE

    def prompt_patches(self, ratio: float) -> int:
        """How many patches `prompt` keeps at this ratio.

        Cuts lie 8 patches apart, after each RST7, as in the paper's script (32 cuts at 256 pixels), where a
        row of patches is a multiple of 8; at other sizes after any patch.
        """
        if not 0 <= ratio <= 1:
            raise UserError(f"prompt ratio {ratio}", "must lie between 0 and 1")
        unit = 1 if self.image_size // MCU_SIZE % 8 else 8
        return unit * int(self.num_patches // unit * ratio)

    def prompt(self, stream: bytes, ratio: float) -> bytes:
        """The prefix that holds the first `prompt_patches(ratio)` patches and nothing of the next one.

        It ends in the restart marker behind them. Where there is none, patches share bytes, and the byte in
        which the last of them ends is left out where the next one begins in it.

        Ratio 0 gives the head alone, ratio 1 the stream. A stream with fewer patches is returned whole.
        """
        start = len(self.preamble)
        patches = self.prompt_patches(ratio)
        if patches == 0:
            return stream[:start]
        if patches == self.num_patches:
            return stream
        last = next(islice(self._patch_ends(stream), patches - 1, None), None)
        return stream if last is None else stream[:last]

    def whole_patches(self, stream: bytes) -> tuple[int, bytes]:
        """How many patches of an unfinished stream are complete, and the prefix that ends with the last of
        them, as in `prompt`: with a restart marker after every patch, `to_file` of it shows these patches as
        they will be in the finished picture, and grey below."""
        ends = list(self._patch_ends(stream))
        return len(ends), stream[: ends[-1] if ends else len(self.preamble)]

    def _patch_ends(self, stream: bytes) -> Iterator[int]:
        """The length of `prompt` for 1, 2, ... patches, as far as the stream has them."""
        start = len(self.preamble)
        if self.restart_interval == 1:  # known without reading the codes, of a damaged stream as well
            return (match.end() for match in _RESTART_MARKER.finditer(stream, start))
        return (start + end for end in self._scan.mcu_ends(stream[start:]))

    @cached_property
    def format(self) -> Format:
        """What every standalone file's head says of its scan."""
        return parse(self.file_head)

    @cached_property
    def _scan(self) -> JpegScan:
        return self.format.scan()

    def check(self, stream: bytes) -> Report:
        """Whether the stream is strictly valid: the codec's head, and every bit of a whole scan and EOI."""
        start = len(self.preamble)
        if not stream.startswith(self.preamble):
            pairs = zip(self.preamble, stream, strict=False)
            offset = next((i for i, (want, got) in enumerate(pairs) if want != got), len(stream))
            return Report(False, "the head differs from the codec's", offset)
        return check_scan(self.format, self._scan, stream[start:], start)

    def grammar(
        self, tokens: Sequence[bytes], canonical: bool = False, in_range: bool = False
    ) -> JpegGrammar:
        """What can follow token by token in this codec's streams.

        Args:
            canonical, in_range: narrower than what decodes; see `Format.scan`.
        """
        return JpegGrammar(self.format, self.preamble, tokens, canonical, in_range)

    def to_dict(self) -> dict[str, Any]:
        """Name and settings, for `get_codec`."""
        settings = asdict(self)
        if self.restart_interval == 1:
            del settings["restart_interval"]  # files written before it was a setting are of the same codec
        return {"name": self.name, "settings": settings}

    def _blank(self) -> Image.Image:
        return Image.new("RGB", (self.image_size, self.image_size))

    def _save(self, picture: Image.Image, streamtype: int) -> bytes:
        buffer = io.BytesIO()
        picture.save(
            buffer,
            format="JPEG",
            quality=self.quality,
            subsampling="4:2:0",
            streamtype=streamtype,
            restart_marker_blocks=self.restart_interval,
        )
        return buffer.getvalue()


def _head_of(file: bytes) -> bytes:
    """The bytes up to the entropy-coded data: SOI, then marker segments up to and with SOS (T.81 B.1.1.4)."""
    position, marker = 2, 0
    while marker != _START_OF_SCAN:
        marker = file[position + 1]
        position += 2 + int.from_bytes(file[position + 2 : position + 4], "big")
    return file[:position]
