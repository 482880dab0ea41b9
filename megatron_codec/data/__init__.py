"""Tokenized pictures and clips on disk, and the order in which training reads them. Needs no torch."""

from megatron_codec.data.dataset import CodecDataset, write_dataset
from megatron_codec.data.manifest import Manifest, Shard
from megatron_codec.data.packing import DocumentRows, PackedSamples

__all__ = [
    "CodecDataset",
    "DocumentRows",
    "Manifest",
    "PackedSamples",
    "Shard",
    "write_dataset",
]
