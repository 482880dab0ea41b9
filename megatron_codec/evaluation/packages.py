"""The packages of the extra `eval`, imported only where they are used."""

import functools
import importlib
import sys
from types import ModuleType, SimpleNamespace
from typing import Any

from megatron_codec.errors import UserError


def package(name: str, distribution: str) -> Any:
    """A module of an optional package.

    Args:
        name: dotted, as it is imported.
        distribution: what pip calls its package.

    Raises:
        UserError: it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        raise UserError(
            f"the package {distribution}",
            f"is not installed ({error})",
            f"pip install {distribution}, or 'megatron_codec[eval]' for all that evaluation needs",
        ) from error


@functools.cache
def clean_fid(module: str) -> Any:
    """A module of clean-fid (Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN
    Evaluation", 2022), for instance `fid`.

    clean-fid imports torchvision, for nothing that is used here. PyPI's is built for CUDA and fails to import
    beside a torch without it; where none can be imported, another module stands in for it meanwhile.

    Raises:
        UserError: clean-fid is not installed.
    """
    try:
        importlib.import_module("torchvision")
        return package(f"cleanfid.{module}", "clean-fid")
    except (ImportError, RuntimeError, OSError):
        _forget("torchvision")  # what a failed import leaves
        sys.modules["torchvision"] = _torchvision()
    try:
        return package(f"cleanfid.{module}", "clean-fid")
    finally:
        _forget("torchvision")


def _torchvision() -> ModuleType:
    """What clean-fid asks of torchvision when it is imported: bases of the blocks of an Inception that it
    builds only for its mode `legacy_pytorch`."""
    from torch.nn import Module

    stand_in = ModuleType("torchvision")
    blocks = {name: type(name, (Module,), {}) for name in ("InceptionA", "InceptionC", "InceptionE")}
    stand_in.__dict__["models"] = SimpleNamespace(inception=SimpleNamespace(**blocks))
    return stand_in


def _forget(name: str) -> None:
    for loaded in [loaded for loaded in sys.modules if loaded.partition(".")[0] == name]:
        del sys.modules[loaded]
