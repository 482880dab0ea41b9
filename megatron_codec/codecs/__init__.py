"""Codecs: pictures and clips to canonical byte streams and back. Needs neither torch nor a tokenizer."""

from megatron_codec.codecs.avc import AvcCodec
from megatron_codec.codecs.base import Codec, DecodeError, ImageCodec, Report, get_codec
from megatron_codec.codecs.jpeg import JpegCodec
from megatron_codec.codecs.pixels import PixelsCodec

__all__ = [
    "AvcCodec",
    "Codec",
    "DecodeError",
    "ImageCodec",
    "JpegCodec",
    "PixelsCodec",
    "Report",
    "get_codec",
]
