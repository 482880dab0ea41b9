"""What one watches: a log line of Megatron's shape, a progress bar, and the numbers for the sinks.

docs/training.md explains the line field by field.
"""

import math
import sys
import time
from datetime import datetime, timedelta

from tqdm import tqdm

from megatron_codec.config import PretrainConfig
from megatron_codec.parallel import Layout
from megatron_codec.training.hooks import Sampled
from megatron_codec.training.sinks import Sinks
from megatron_codec.training.step import StepResult
from megatron_codec.training.throughput import Throughput, peak_memory


class Metrics:
    """Collects steps between log lines, and writes on the main process only.

    Args:
        first: steps done before this run, so that a resumed run's bar and lines go on from there.
        num_tokens: ids of the tokenizer, BOS and EOS included.
    """

    def __init__(self, config: PretrainConfig, layout: Layout, first: int, num_tokens: int):
        self.config, self.layout = config, layout
        self.throughput = Throughput(config, num_tokens, layout.device, config.fp8.in_hardware)
        self.steps: list[StepResult] = []
        self.skipped = 0
        self.seconds, self.since = 0.0, time.perf_counter()
        self.sinks = self.bar = None
        if not layout.is_main:
            return
        self.sinks = Sinks(config, first)
        # Where standard error is no terminal, the log lines say enough.
        self.bar = tqdm(
            total=config.training.train_iters, initial=first, unit="step", disable=None, dynamic_ncols=True
        )

    def step(self, iteration: int, learning_rate: float, result: StepResult) -> None:
        """Takes in a finished step; `iteration` counts finished steps."""
        self.steps.append(result)
        self.seconds += time.perf_counter() - self.since
        self.restart_clock()
        self.skipped += result.skipped
        if self.bar is not None:
            self.bar.update()
        if iteration % self.config.logging.log_interval == 0 or iteration == self.config.training.train_iters:
            self._log(iteration, learning_rate)

    def _log(self, iteration: int, learning_rate: float) -> None:
        training = self.config.training
        seconds = self.seconds / len(self.steps)
        loss = sum(step.loss for step in self.steps) / len(self.steps)
        waited = sum(step.data_wait for step in self.steps) / len(self.steps)
        grad_norm = self.steps[-1].grad_norm
        tokens = training.global_batch_size * self.config.model.seq_length / seconds / self.layout.world_size
        used = self.throughput.of(tokens)
        memory = peak_memory(self.layout)
        left = timedelta(seconds=round(seconds * (training.train_iters - iteration)))
        self.say(
            f"iteration {iteration:8d}/{training.train_iters:8d} | "
            f"consumed samples: {iteration * training.global_batch_size:12d} | "
            f"elapsed time per iteration (ms): {seconds * 1000:.1f} | "
            f"learning rate: {learning_rate:.6E} | global batch size: {training.global_batch_size:5d} | "
            f"lm loss: {loss:.6E} | grad norm: {grad_norm:.3f} | "
            f"number of skipped iterations: {self.skipped:3d} | "
            f"{self._speed(tokens, used)} | {_memory_text(memory)} | "
            f"data wait (ms): {waited * 1000:.2f} | time left: {left}"
        )
        self._write(
            iteration,
            {
                "loss": loss,
                "learning_rate": learning_rate,
                "grad_norm": grad_norm,
                "seconds_per_iteration": seconds,
                "tokens_per_second_per_device": tokens,
                **used,
                **memory,
                "data_wait_seconds": waited,
            },
        )
        self.steps, self.skipped, self.seconds = [], 0, 0.0
        self.restart_clock()

    def _speed(self, tokens: float, used: dict[str, float]) -> str:
        device = "GPU" if self.layout.device.type == "cuda" else "CPU"
        full, causal = used["tflops_per_device"], used["tflops_per_device_causal_attention"]
        text = (
            f"tokens/s/{device}: {tokens:.0f} | "
            f"TFLOP/s/{device}: {full:.4g} (full attention), {causal:.4g} (causal)"
        )
        if "mfu_full_attention" in used:
            full, causal = used["mfu_full_attention"], used["mfu_causal_attention"]
            text += f" | MFU: {full:.1%} (full attention), {causal:.1%} (causal)"
        return text

    def evaluation(
        self, iteration: int, loss: float, bits_per_byte: float | None, name: str = "validation"
    ) -> None:
        """Takes in an evaluation on held-out documents; `name` is what they are held out for.

        Args:
            loss: mean nats a token.
            bits_per_byte: the same as bits a byte of payload; None where there is no payload.
        """
        values = {f"{name}_loss": loss}
        text = (
            f"{name} loss at iteration {iteration} | lm loss value: {loss:.6E} | "
            f"lm loss PPL: {math.exp(min(loss, 20)):.6E}"
        )
        if bits_per_byte is not None:
            text += f" | bits a byte of payload: {bits_per_byte:.4f}"
            values[f"{name}_bits_per_byte"] = bits_per_byte
        self.say(text)
        self._write(iteration, values)

    def samples(self, iteration: int, sampled: Sampled | None) -> None:
        """Takes in pictures that the model in training wrote; None on processes that have none."""
        if sampled is None:
            return
        self.say(
            f"sampled {sampled.count} pictures at iteration {iteration} in {sampled.seconds:.1f} s | "
            f"decode: {sampled.share_that_decodes:.1%} | "
            f"valid: {sampled.share_valid:.1%}"
        )
        self._write(
            iteration,
            {
                "share_that_decodes": sampled.share_that_decodes,
                "share_valid": sampled.share_valid,
            },
        )
        if self.sinks is not None:
            self.sinks.picture(iteration, "samples", sampled.sheet)

    def restart_clock(self) -> None:
        """Leaves out of the time of steps what came since the last one: an evaluation, a checkpoint."""
        self.since = time.perf_counter()

    def say(self, text: str) -> None:
        """Prints a line with the time, above the bar, on the main process."""
        if self.layout.is_main:
            tqdm.write(f" [{datetime.now():%Y-%m-%d %H:%M:%S}] {text}")
            sys.stdout.flush()  # into a file or a pipe, Python would write only every 8 KiB

    def _write(self, iteration: int, values: dict[str, float]) -> None:
        if self.sinks is not None:
            self.sinks.scalars(iteration, values)

    def close(self) -> None:
        """Closes the bar and every sink, whatever one of them raises."""
        if self.bar is not None:
            self.bar.close()
        if self.sinks is not None:
            self.sinks.close()


def _memory_text(memory: dict[str, float]) -> str:
    text = f"memory (GiB): {memory['memory_gib']:.2f}"
    if "memory_reserved_gib" in memory:
        text += f", reserved {memory['memory_reserved_gib']:.2f}"
    return text
