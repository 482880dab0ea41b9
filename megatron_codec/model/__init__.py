"""The Llama-2 decoder on Megatron-Core: layers, and weights that do not depend on the layout."""

from megatron_codec import platform

platform.prepare()  # before anything below imports megatron.core

from megatron_codec.model.llama import build_model, initialize_weights, transformer_config  # noqa: E402

__all__ = ["build_model", "initialize_weights", "transformer_config"]
