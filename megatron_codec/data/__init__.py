"""Tokenized pictures and clips on disk, and the order in which training reads them. Needs no torch."""

from megatron_codec.data.dataset import CodecDataset, write_dataset
from megatron_codec.data.manifest import Manifest, Shard
from megatron_codec.data.packing import DocumentBatch, PackedSamples, document_batches

__all__ = [
    "CodecDataset",
    "DocumentBatch",
    "Manifest",
    "PackedSamples",
    "Shard",
    "document_batches",
    "write_dataset",
]
