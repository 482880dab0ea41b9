"""From pictures to a dataset, in any number of processes. Needs neither torch nor Megatron-Core."""

from megatron_codec.preprocessing.build import build_dataset
from megatron_codec.preprocessing.sources import open_pictures
from megatron_codec.preprocessing.streams import iterate_streams

__all__ = ["build_dataset", "iterate_streams", "open_pictures"]
