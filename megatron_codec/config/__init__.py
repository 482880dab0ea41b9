"""Configuration: frozen dataclasses whose fields are Megatron's flags and whose docstrings are the help.

`num_layers` is `--num-layers`. A preset (presets.py) gives the defaults; flags replace single values. Checks
that need only the values live here, and all faults of a command line are reported together.
"""

from megatron_codec.config.checkpoint import CheckpointConfig
from megatron_codec.config.data import DataConfig
from megatron_codec.config.fp8 import Fp8Config, transformer_engine_installed
from megatron_codec.config.logging import LoggingConfig
from megatron_codec.config.model import ModelConfig
from megatron_codec.config.parallel import ParallelConfig
from megatron_codec.config.run import PretrainConfig
from megatron_codec.config.training import TrainingConfig

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "Fp8Config",
    "LoggingConfig",
    "ModelConfig",
    "ParallelConfig",
    "PretrainConfig",
    "TrainingConfig",
    "transformer_engine_installed",
]
