"""Transformer Engine's published Python source, as an oracle: it cannot be imported without CUDA.

requirements/install.sh puts it, without its dependencies, into .venv/transformer_engine.
"""

import ast
import functools
import inspect
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
import torch

FOLDER = Path(sys.prefix) / "transformer_engine"


@functools.cache
def source(path: str) -> ast.Module:
    """A file of it, parsed; skips the test where it is not installed."""
    file = FOLDER / path
    if not file.exists():
        pytest.skip(f"{file} is not there: source requirements/install.sh dev")
    return ast.parse(file.read_text(encoding="utf-8"))


def published(path: str) -> dict[str, Any]:
    """The functions at the top of a file, ready to be called; its imports are left out but for torch."""
    functions: list[ast.stmt] = [node for node in source(path).body if isinstance(node, ast.FunctionDef)]
    for function in functions:
        assert isinstance(function, ast.FunctionDef)
        function.decorator_list = []
        for node in ast.walk(function):  # annotations name what was not imported
            if isinstance(node, ast.arg):
                node.annotation = None
        function.returns = None
    names: dict[str, Any] = {"torch": torch, **{name: getattr(typing, name) for name in typing.__all__}}
    exec(compile(ast.Module(functions, []), path, "exec"), names)
    return names


def signature(path: str, name: str, method: str = "__init__") -> inspect.Signature:
    """Of a function, a method of a class, or the fields of a dataclass; every default is given as None."""
    for node in source(path).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            for part in node.body:
                if isinstance(part, ast.FunctionDef) and part.name == method:
                    return _signature(part.args)
            fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
            return inspect.Signature(
                [
                    inspect.Parameter(
                        part.target.id,  # type: ignore[union-attr]
                        inspect.Parameter.POSITIONAL_OR_KEYWORD,
                        default=None if part.value else inspect.Parameter.empty,
                    )
                    for part in fields
                ]
            )
        if isinstance(node, ast.FunctionDef) and node.name == name:
            return _signature(node.args)
    raise AssertionError(f"{path} has no {name}")


def _signature(arguments: ast.arguments) -> inspect.Signature:
    given = [*arguments.posonlyargs, *arguments.args]
    required = len(given) - len(arguments.defaults)
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [
        inspect.Parameter(arg.arg, kind, default=inspect.Parameter.empty if number < required else None)
        for number, arg in enumerate(given)
        if arg.arg != "self"
    ]
    parameters += [
        inspect.Parameter(
            arg.arg,
            inspect.Parameter.KEYWORD_ONLY,
            default=inspect.Parameter.empty if default is None else None,
        )
        for arg, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    ]
    if arguments.kwarg:
        parameters.append(inspect.Parameter(arguments.kwarg.arg, inspect.Parameter.VAR_KEYWORD))
    return inspect.Signature(parameters)
