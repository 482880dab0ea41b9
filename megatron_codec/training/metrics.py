"""What one watches: a log line of Megatron's shape, JSON lines for scripts, TensorBoard, a progress bar."""

import json
import math
import time
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from tqdm import tqdm

from megatron_codec.config import PretrainConfig
from megatron_codec.parallel import Layout
from megatron_codec.training.step import StepResult


class Metrics:
    """Collects steps between log lines, and writes on the main process only.

    Args:
        first: steps done before this run, so that a resumed run's bar and lines go on from there.
    """

    def __init__(self, config: PretrainConfig, layout: Layout, first: int):
        self.config, self.layout = config, layout
        self.steps: list[StepResult] = []
        self.skipped = 0
        self.since = time.perf_counter()
        self.file = self.board = self.bar = None
        if not layout.is_main:
            return
        settings = config.logging
        path = settings.metrics_file or (
            config.checkpoint.save and Path(config.checkpoint.save) / "metrics.jsonl"
        )
        if path:
            Path(path).parent.mkdir(parents=True, exist_ok=True)
            _drop_lines_after(Path(path), first)
            self.file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()
        if settings.tensorboard_dir:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(settings.tensorboard_dir, purge_step=first)
        # Where standard error is no terminal, the log lines say enough.
        self.bar = tqdm(
            total=config.training.train_iters, initial=first, unit="step", disable=None, dynamic_ncols=True
        )

    def step(self, iteration: int, learning_rate: float, result: StepResult) -> None:
        """Takes in a finished step; `iteration` counts finished steps."""
        self.steps.append(result)
        self.skipped += result.skipped
        if self.bar is not None:
            self.bar.update()
        if iteration % self.config.logging.log_interval == 0 or iteration == self.config.training.train_iters:
            self._log(iteration, learning_rate)

    def _log(self, iteration: int, learning_rate: float) -> None:
        training = self.config.training
        seconds = (time.perf_counter() - self.since) / len(self.steps)
        loss = sum(step.loss for step in self.steps) / len(self.steps)
        waited = sum(step.data_wait for step in self.steps) / len(self.steps)
        grad_norm = self.steps[-1].grad_norm
        tokens = training.global_batch_size * self.config.model.seq_length / seconds / self.layout.world_size
        device = "GPU" if self.layout.device.type == "cuda" else "CPU"
        left = timedelta(seconds=round(seconds * (training.train_iters - iteration)))
        self.say(
            f"iteration {iteration:8d}/{training.train_iters:8d} | "
            f"consumed samples: {iteration * training.global_batch_size:12d} | "
            f"elapsed time per iteration (ms): {seconds * 1000:.1f} | "
            f"learning rate: {learning_rate:.6E} | global batch size: {training.global_batch_size:5d} | "
            f"lm loss: {loss:.6E} | grad norm: {grad_norm:.3f} | "
            f"number of skipped iterations: {self.skipped:3d} | "
            f"tokens/s/{device}: {tokens:.0f} | data wait (ms): {waited * 1000:.2f} | time left: {left}"
        )
        self._write(
            iteration,
            {
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "seconds_per_iteration": seconds,
                "tokens_per_second_per_device": tokens,
                "data_wait_seconds": waited,
            },
        )
        self.steps, self.skipped = [], 0
        self.restart_clock()

    def evaluation(self, iteration: int, loss: float, name: str = "validation") -> None:
        """Takes in the mean nats a token on held-out documents; `name` is what they are held out for."""
        self.say(
            f"{name} loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {math.exp(min(loss, 20)):.6E}"
        )
        self._write(iteration, {f"{name}_loss": loss})

    def restart_clock(self) -> None:
        """Leaves out of the time per step what was not a step: an evaluation, a checkpoint."""
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line with the time, above the bar, on the main process."""
        if self.layout.is_main:
            tqdm.write(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}")

    def _write(self, iteration: int, values: dict[str, Any]) -> None:
        if self.file:
            self.file.write(json.dumps({"iteration": iteration, **values}) + "\n")
            self.file.flush()
        if self.board:
            for name, value in values.items():
                self.board.add_scalar(name, value, iteration)

    def close(self) -> None:
        """Closes file, TensorBoard and bar."""
        for sink in (self.file, self.board, self.bar):
            if sink is not None:
                sink.close()


def _drop_lines_after(path: Path, iteration: int) -> None:
    """A run that goes on from a checkpoint repeats the steps after it, and must not write them twice."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        if kept != lines:
            path.write_text("".join(kept), encoding="utf-8")
