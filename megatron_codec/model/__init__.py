"""The Llama-2 decoder on Megatron-Core: layers, and weights that do not depend on the layout."""

from megatron_codec import platform

platform.prepare()  # before anything below imports megatron.core

from megatron_codec.model.fp8 import DelayedScales  # noqa: E402
from megatron_codec.model.llama import build_model, transformer_config  # noqa: E402
from megatron_codec.model.weights import initialize_weights, named_parameters  # noqa: E402

__all__ = ["DelayedScales", "build_model", "initialize_weights", "named_parameters", "transformer_config"]
