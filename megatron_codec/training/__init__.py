"""Pretraining: read pretrain.py first."""

import megatron_codec.model  # noqa: F401  prepares the platform before megatron.core is imported
