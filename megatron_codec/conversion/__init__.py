"""Checkpoints to Hugging Face folders and back, and proof that both are the same model."""

from megatron_codec import platform

platform.prepare()  # before anything below imports megatron.core

from megatron_codec.conversion.convert import ConvertConfig, convert  # noqa: E402

__all__ = ["ConvertConfig", "convert"]
