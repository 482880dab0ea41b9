"""Forks of a process that has imported what most tests need, where starting anew costs seconds of imports.

The process is multiprocessing's fork server, one for each process of tests, and starts with the first fork.
"""

import contextlib
import multiprocessing.forkserver
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
# What functions of tests and our tools import, and what optimizers and checkpoints import when they are made.
_IMPORTED = [
    "tests.distributed.jobs",
    "torch._dynamo",
    "megatron.core.dist_checkpointing.serialization",
    "megatron_codec.evaluation.evaluate",
    "megatron_codec.inference.generate",
]
ONE_THREAD = {"OMP_NUM_THREADS": "1"}  # threads of a library are counted when it is loaded


class Fork:
    """A process of the fork server, asked and told as a `subprocess.Popen` is."""

    def __init__(self, process: BaseProcess):
        self._process = process

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        """The exit status. Raises subprocess.TimeoutExpired."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self._process.pid is not None
        os.kill(self._process.pid, number)

    def kill(self) -> None:
        self._process.kill()

    def end(self) -> None:
        """Ends it with its children."""
        assert self._process.pid is not None
        end_session(self._process.pid)
        self._process.kill()  # where it had not come to a session of its own
        self._process.join()


def start(function: Callable[..., None], folder: Path, variables: Mapping[str, str], *arguments: Any) -> Fork:
    """Calls the function in a fork with these variables, in a session of its own, in a folder."""
    context = multiprocessing.get_context("forkserver")
    with mock.patch.dict(os.environ, ONE_THREAD | {"PYTHONPATH": str(ROOT)}):
        context.set_forkserver_preload(_IMPORTED)
        multiprocessing.forkserver.ensure_running()
    process = context.Process(target=_enter, args=(function, str(folder), dict(variables), *arguments))
    process.start()
    return Fork(process)


def start_tool(
    name: str,
    arguments: Sequence[object],
    output: Path,
    errors: Path | None = None,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
) -> Fork:
    """Starts tools/NAME.py as `python tools/NAME.py ARGUMENTS` would, printing to files.

    Args:
        environment: variables on top of those of this process, which has no ranks.
    """
    variables = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE")}
    variables |= ONE_THREAD | {"PYTHONPATH": str(ROOT)} | dict(environment or {})
    command = [str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)]
    for file in filter(None, (output, errors)):
        file.write_bytes(b"")
    return start(_run, cwd, variables, output, errors, command)


def end_session(leader: int) -> None:
    """Ends a process that leads a session and what it started, its forks among them."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)


def redirect(output: Path, errors: Path | None = None) -> None:
    """Appends what this process and its children print to files, both kinds to one where there is one."""
    for descriptor, file in ((1, output), (2, errors or output)):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(opened, descriptor)
        os.close(opened)


def run_tool(
    name: str,
    *arguments: object,
    cwd: Path = ROOT,
    environment: Mapping[str, str] | None = None,
    timeout: float = 240,
) -> subprocess.CompletedProcess[str]:
    """`start_tool` to its end, with what it printed; raises subprocess.TimeoutExpired. No process is left."""
    with tempfile.TemporaryDirectory() as made:
        files = (Path(made) / "output", Path(made) / "errors")
        process = start_tool(name, arguments, *files, cwd=cwd, environment=environment)
        try:
            status = process.wait(timeout)
        finally:
            process.end()
        output, errors = (file.read_text() for file in files)
    return subprocess.CompletedProcess([name, *map(str, arguments)], status, output, errors)


def _enter(function: Callable[..., None], folder: str, variables: Mapping[str, str], *arguments: Any) -> None:
    os.setsid()
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(variables)
    function(*arguments)


def _run(output: Path, errors: Path | None, command: list[str]) -> None:
    redirect(output, errors)
    sys.argv = command
    sys.path[0] = str(ROOT / "tools")
    runpy.run_path(command[0], run_name="__main__")
