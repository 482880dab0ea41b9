"""Codecs: pictures and clips to canonical byte streams and back. Needs neither torch nor a tokenizer."""

from megatron_codec.codecs.avc import AvcCodec
from megatron_codec.codecs.base import Codec, DecodeError, ImageCodec, Report, get_codec
from megatron_codec.codecs.jpeg import JpegCodec

__all__ = ["AvcCodec", "Codec", "DecodeError", "ImageCodec", "JpegCodec", "Report", "get_codec"]
