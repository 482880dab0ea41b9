"""Runs a function in N real processes that meet over gloo, as torchrun would start them.

    results = launch("tests.distributed.jobs:train", 2, command_lines=[["--tensor-model-parallel-size", "2"]])

The function is called in every process with the keyword arguments, which travel as JSON, and its results
come back as JSON, in the order of the ranks. Starting costs seconds of imports, so one launch should run
through many layouts (`parallel.initialize` may be called again and again). And where no GPU is seen, one
process imports and the ranks are its forks; but for the functions of ALONE it is the same process every time,
multiprocessing's fork server. CUDA does not live through a fork.
"""

import contextlib
import json
import os
import pkgutil
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_codec.files import write_json
from tests import forks
from tests.forks import ROOT, Fork, redirect

ALONE = {"tests.distributed.te_jobs"}  # has to do something before Megatron-Core is imported
_OUTPUT_SHOWN = 6000  # characters of a failed rank's output


class RankFailed(Exception):
    """A process ended with another status than 0, or did not end in time.

    Attributes:
        statuses: exit status of each rank when the failure was seen (-9 for SIGKILL), None while it ran.
    """

    def __init__(self, message: str, statuses: list[int | None]):
        self.statuses = statuses
        super().__init__(message)


def launch(
    function: str,
    world_size: int,
    timeout: float = 480,
    environment: Mapping[str, str] | None = None,
    **arguments: Any,
) -> list[Any]:
    """Calls `module:name` with `arguments` in `world_size` processes and returns the result of each rank.

    Args:
        environment: variables of the processes on top of those of this one.

    Raises:
        RankFailed: with the output of the ranks that failed, or of all when the time is over. No process
            is left behind.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "arguments.json").write_text(json.dumps(arguments))
        ranks = [str(rank) for rank in range(world_size)]
        if function.partition(":")[0] not in ALONE and not environment and not sees_gpus(environment):
            starting = _forked(function, folder, ranks)
        else:
            starts = [[rank] for rank in ranks] if sees_gpus(environment) else [ranks]
            command = [sys.executable, "-m", "tests.distributed.launch", function, str(folder)]
            starting = running([[*command, *start] for start in starts], folder, environment)
        with starting as processes:
            wait_for_all(processes, folder, timeout, world_size)
        return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world_size)]


@contextlib.contextmanager
def running(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Starts command i as rank i of a world of `len(commands)`, with its output in FOLDER/output-i.txt.

    Ends what is left of them, with their children, when the block is left.
    """
    shared = _shared_variables() | dict(environment or {})
    processes = []
    try:
        for rank, command in enumerate(commands):
            variables = os.environ | _place(rank, len(commands)) | shared
            with open(folder / f"output-{rank}.txt", "wb") as output:
                processes.append(
                    subprocess.Popen(
                        command,
                        cwd=ROOT,
                        env=variables,
                        stdin=subprocess.DEVNULL,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                )
        yield processes
    finally:
        for process in processes:
            forks.end_session(process.pid)
            process.wait()


@contextlib.contextmanager
def running_tool(
    name: str, arguments: Sequence[object], world_size: int, folder: Path
) -> Iterator[list[Fork]]:
    """`running` for tools/NAME.py in so many processes, without its imports."""
    shared = _shared_variables()
    processes = []
    try:
        for rank in range(world_size):
            place = _place(rank, world_size) | shared
            output = folder / f"output-{rank}.txt"
            processes.append(forks.start_tool(name, arguments, output, environment=place))
        yield processes
    finally:
        for process in processes:
            process.end()


def _place(rank: int, world_size: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def _free_port() -> int:
    """A port that nobody listens at, and that the system gives to nobody who lets it choose: ranks that meet
    again and again leave it free in between."""
    while True:
        port = random.SystemRandom().randrange(20000, 32000)  # Linux gives from 32768 on
        with socket.socket() as free, contextlib.suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port


def _shared_variables() -> dict[str, str]:
    """What all ranks of a world find in their environment, with a port to meet at."""
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }


class Polled(Protocol):
    """A process that can be asked for its exit status, None while it runs."""

    def poll(self) -> int | None: ...


@contextlib.contextmanager
def _forked(function: str, folder: Path, ranks: Sequence[str]) -> Iterator[list[Fork]]:
    """Calls the function in forks of a process that has imported, kept for the next time."""
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    process = forks.start(
        _enter, ROOT, os.environ | _shared_variables() | alone, function, str(folder), *ranks
    )
    try:
        yield [process]
    finally:
        process.end()


def _enter(function: str, folder: str, *ranks: str) -> None:
    redirect(Path(folder) / "output-0.txt")
    _main(function, folder, *ranks)


def sees_gpus(environment: Mapping[str, str] | None) -> bool:
    """Whether processes with these variables on top of those of this one may use a GPU."""
    return (os.environ | dict(environment or {})).get("CUDA_VISIBLE_DEVICES") != ""


def wait_for_all(
    processes: Sequence[Polled], folder: Path, timeout: float, world_size: int | None = None
) -> None:
    """Waits until every rank has ended with status 0.

    Args:
        world_size: ranks, where they are forks of one process.

    Raises:
        RankFailed: as soon as one has not, or after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        statuses = [process.poll() for process in processes]
        if world_size is not None and len(processes) < world_size:
            told = [folder / f"status-{rank}.json" for rank in range(world_size)]
            of_ranks = [json.loads(file.read_text()) if file.exists() else None for file in told]
            # Without forks it failed at its imports.
            statuses = of_ranks if any(s is not None for s in of_ranks) else statuses * world_size
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed or time.monotonic() > deadline:
            break
        if all(status == 0 for status in statuses):
            return
        time.sleep(0.05)
    head = f"ranks {failed} failed" if failed else f"not done after {timeout:g} s"
    parts = [f"{head}, exit statuses {statuses}"]
    for rank in failed or range(len(statuses)):
        file = folder / f"output-{rank}.txt"
        output = file.read_text(errors="replace") if file.exists() else "the same"
        parts.append(f"---- output of rank {rank} ----\n{output[-_OUTPUT_SHOWN:]}")
    raise RankFailed("\n".join(parts), statuses)


def _fork(folder: Path, world_size: int) -> int:
    """Forks a process for each rank and returns there with the rank; here it ends when all of them have."""
    ranks = {}
    for rank in range(world_size):
        process = os.fork()
        if not process:
            os.environ.update(_place(rank, world_size))
            redirect(folder / f"output-{rank}.txt")
            return rank
        ranks[process] = rank
    while ranks:
        process, status = os.wait()
        write_json(folder / f"status-{ranks.pop(process)}.json", os.waitstatus_to_exitcode(status))
    sys.exit()


def _main(function: str, folder: str, *ranks: str) -> None:
    called = pkgutil.resolve_name(function)
    rank = _fork(Path(folder), len(ranks)) if ranks[1:] else ranks[0]
    arguments = json.loads((Path(folder) / "arguments.json").read_text())
    result = called(**arguments)
    (Path(folder) / f"result-{rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    _main(*sys.argv[1:])
