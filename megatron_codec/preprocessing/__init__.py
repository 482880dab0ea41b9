"""From pictures to a dataset, in any number of processes. Needs neither torch nor Megatron-Core."""

from megatron_codec.preprocessing.build import build_dataset
from megatron_codec.preprocessing.decoders import PillowDecoder
from megatron_codec.preprocessing.pictures import PictureEncoder, iterate_streams
from megatron_codec.preprocessing.skipping import SkipLimit
from megatron_codec.preprocessing.sources import Selection, open_inputs

__all__ = [
    "PictureEncoder",
    "PillowDecoder",
    "Selection",
    "SkipLimit",
    "build_dataset",
    "iterate_streams",
    "open_inputs",
]
