"""A window of steps under torch's profiler: a trace to look at, and the operators that cost most."""

import os
import sys
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

from megatron_codec.config import PretrainConfig
from megatron_codec.parallel import Layout

_OPERATORS = 15  # lines of the table


class ProfileWindow:
    """Profiles the steps START to END (excluded) on the chosen processes; elsewhere it does nothing.

    Step i is the one that begins with i steps done. Each chosen process writes
    `FOLDER/rank_0_steps_10_to_12.pt.trace.json.gz` (Chrome's trace format; ui.perfetto.dev opens it), FOLDER
    being `profile` in --tensorboard-dir, else in --save; the first of them prints the table.
    """

    def __init__(self, config: PretrainConfig, layout: Layout):
        settings = config.logging
        self._start, self._end = settings.profile_steps or (0, 0)
        self._rank, self._chosen = layout.rank, layout.rank in settings.profile_ranks
        self._speaks = bool(settings.profile_ranks) and layout.rank == min(settings.profile_ranks)
        self._folder = Path(settings.tensorboard_dir or config.checkpoint.save or "") / "profile"
        self._cuda = layout.device.type == "cuda"
        self._running: profile | None = None
        self._first = self._done = 0

    def reached(self, iteration: int) -> bool:
        """Says that `iteration` steps are done; begins or ends the window if it is time, which takes a while.

        Returns:
            Whether it was.
        """
        if self._running is not None:
            self._done = iteration
            if iteration < self._end:
                return False
            self.close()
            return True
        if not self._chosen or not self._start <= iteration < self._end:
            return False
        activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * self._cuda
        self._running = profile(activities=activities)
        self._first = self._done = iteration
        self._running.start()
        return True

    def close(self) -> None:
        """Ends a window that is open, also before its last step, and writes what there is."""
        if self._running is None:
            return
        if self._cuda:
            torch.cuda.synchronize()
        running, self._running = self._running, None
        running.stop()
        if self._done == self._first:  # not one step was made
            return
        path = self._folder / f"rank_{self._rank}_steps_{self._first}_to_{self._done}.pt.trace.json.gz"
        self._folder.mkdir(parents=True, exist_ok=True)
        # The profiler compresses where a name ends in .gz; only a whole trace gets the name.
        temporary = path.with_name(f".{path.name.removesuffix('.gz')}.{os.getpid()}.tmp.gz")
        try:
            running.export_chrome_trace(str(temporary))
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        if self._speaks:
            tqdm.write(self._table(running, path))
            sys.stdout.flush()

    def _table(self, running: profile, path: Path) -> str:
        """The operators by the time spent in themselves, on the GPU if there is one."""

        def own(event) -> float:
            return event.self_device_time_total if self._cuda else event.self_cpu_time_total

        events = sorted(running.key_averages(), key=own, reverse=True)
        steps, total = self._done - self._first, sum(map(own, events)) or 1.0
        lines = [
            f" profile of process {self._rank}, {steps} steps, own time on the "
            f"{'GPU' if self._cuda else 'CPU'}; the trace is {path}",
            f"  {'ms a step':>10}  {'share':>6}  {'calls a step':>12}  operator",
        ]
        for event in events[:_OPERATORS]:
            milliseconds, calls = own(event) / 1000 / steps, event.count / steps
            lines.append(
                f"  {milliseconds:10.3f}  {own(event) / total:6.1%}  {calls:12.1f}  {event.key[:70]}"
            )
        return "\n".join(lines)
