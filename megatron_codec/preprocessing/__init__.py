"""From pictures or videos to a dataset, in any number of processes. Needs neither torch nor Megatron-Core."""

from megatron_codec.preprocessing.build import build_dataset
from megatron_codec.preprocessing.decoders import PillowDecoder
from megatron_codec.preprocessing.pictures import PictureEncoder, iterate_streams
from megatron_codec.preprocessing.skipping import SkipLimit
from megatron_codec.preprocessing.sources import Selection, open_inputs
from megatron_codec.preprocessing.videos import VideoEncoder

__all__ = [
    "PictureEncoder",
    "PillowDecoder",
    "Selection",
    "SkipLimit",
    "VideoEncoder",
    "build_dataset",
    "iterate_streams",
    "open_inputs",
]
