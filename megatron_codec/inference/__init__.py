"""Generation: the trained weights with a paged cache of rotated keys, continuous batching, decoded results.

Read `engine.py` first, then `scheduler.py` (which tokens come next), `blocks.py` (whose memory is whose),
`step.py` and `decoder.py` (one forward pass), `attention.py`, `drawing.py` (from logits to tokens),
`sampling.py`; `loop.py` is for servers.
"""

import megatron_codec.model  # noqa: F401  prepares the platform before megatron.core is imported
from megatron_codec.inference.completion import Completion
from megatron_codec.inference.config import EngineConfig
from megatron_codec.inference.engine import Engine
from megatron_codec.inference.sampling import Sampling

__all__ = ["Completion", "Engine", "EngineConfig", "Sampling"]
