"""Runs one job in each of several processes, listens to them, and ends them all if one fails."""

import contextlib
import multiprocessing
import signal
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any, TypeVar

from megatron_codec.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")
Tell = Callable[[Any], None]


def run_in_processes(
    task: Callable[[Job, Tell], Result], jobs: Sequence[Job], listen: Callable[[Any], None]
) -> list[Result]:
    """Calls `task(job, tell)` for every job, each in a process of its own.

    Args:
        task: a function of a module, so that it can be sent to the processes.
        jobs: sent to the processes as well.
        listen: gets, in this process, what the tasks pass to `tell`.

    Returns the results in the order of the jobs. The first exception of a task is raised here, as is a
    UserError for a process that dies. However this ends, Ctrl-C included, no process is left, and each has
    run its `finally` clauses unless it was killed.
    """
    # A fresh interpreter: forking copies the locks of threads (progress bars, BLAS) that it does not copy.
    context = multiprocessing.get_context("spawn")
    processes, results = {}, {}
    try:
        for number, job in enumerate(jobs):
            ours, theirs = context.Pipe(duplex=False)
            process = context.Process(target=_work, args=(theirs, task, job), daemon=True)
            processes[ours] = number, process
            process.start()
            theirs.close()
        while len(results) < len(jobs):
            for connection in wait([c for c, (number, _) in processes.items() if number not in results]):
                assert isinstance(connection, Connection)
                number, process = processes[connection]
                try:
                    kind, value = connection.recv()
                except EOFError:
                    process.join()
                    rule = f"died with exit code {process.exitcode}"
                    raise UserError(
                        f"worker {number}", rule, "if memory ran out, use fewer workers"
                    ) from None
                if kind == "failed":
                    raise value
                if kind == "done":
                    results[number] = value
                else:
                    listen(value)
        return [results[number] for number in range(len(jobs))]
    finally:
        for number, process in processes.values():
            if process.pid is not None:
                if number not in results:
                    process.terminate()
                process.join()


def _work(connection: Connection, task: Callable[[Any, Tell], Any], job: Any) -> None:
    # Ctrl-C reaches the whole process group; the parent alone decides, and ends its workers by SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    try:
        message = "done", task(job, lambda value: connection.send(("told", value)))
    except Exception as error:
        message = "failed", error
    # Nobody is left to tell if the parent was killed.
    with contextlib.suppress(BrokenPipeError):
        connection.send(message)
