"""Generation: the trained model with its own cache of rotated keys, sampling, and decoded results."""

import megatron_codec.model  # noqa: F401  prepares the platform before megatron.core is imported
from megatron_codec.inference.engine import Completion, Engine
from megatron_codec.inference.sampling import Sampling

__all__ = ["Completion", "Engine", "Sampling"]
