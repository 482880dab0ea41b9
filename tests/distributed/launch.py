"""Runs a function in N real processes that meet over gloo, as torchrun would start them.

    results = launch("tests.distributed.jobs:train", 2, command_lines=[["--tensor-model-parallel-size", "2"]])

The function is called in every process with the keyword arguments, which travel as JSON, and its results
come back as JSON, in the order of the ranks. Starting a process costs seconds of imports, so one launch
should run through many layouts (`parallel.initialize` may be called again and again).
"""

import contextlib
import json
import os
import pkgutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
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
        commands = [
            [sys.executable, "-m", "tests.distributed.launch", function, str(folder), str(rank)]
            for rank in range(world_size)
        ]
        with running(commands, folder, environment) as processes:
            wait_for_all(processes, folder, timeout)
        return [json.loads((folder / f"result-{rank}.json").read_text()) for rank in range(world_size)]


@contextlib.contextmanager
def running(
    commands: Sequence[Sequence[str]], folder: Path, environment: Mapping[str, str] | None = None
) -> Iterator[list[subprocess.Popen]]:
    """Starts command i as rank i of a world of `len(commands)`, with its output in FOLDER/output-i.txt.

    Ends what is left of them, with their children, when the block is left.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    try:
        for rank, command in enumerate(commands):
            variables = {
                **os.environ,
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(len(commands)),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
                **(environment or {}),
            }
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
            # The whole session: the checkpoint writer has processes of its own.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def wait_for_all(processes: list[subprocess.Popen], folder: Path, timeout: float) -> None:
    """Waits until every process has ended with status 0.

    Raises:
        RankFailed: as soon as one has not, or after `timeout` seconds.
    """
    deadline = time.monotonic() + timeout
    while True:
        statuses = [process.poll() for process in processes]
        failed = [rank for rank, status in enumerate(statuses) if status]
        if failed or time.monotonic() > deadline:
            break
        if all(status == 0 for status in statuses):
            return
        time.sleep(0.05)
    head = f"ranks {failed} failed" if failed else f"not done after {timeout:g} s"
    parts = [f"{head}, exit statuses {statuses}"]
    for rank in failed or range(len(processes)):
        output = (folder / f"output-{rank}.txt").read_text(errors="replace")
        parts.append(f"---- output of rank {rank} ----\n{output[-_OUTPUT_SHOWN:]}")
    raise RankFailed("\n".join(parts), statuses)


def _main(function: str, folder: str, rank: str) -> None:
    arguments = json.loads((Path(folder) / "arguments.json").read_text())
    result = pkgutil.resolve_name(function)(**arguments)
    (Path(folder) / f"result-{rank}.json").write_text(json.dumps(result))


# The checkpoint writer spawns processes that import this file again.
if __name__ == "__main__":
    _main(*sys.argv[1:])
