"""What one watches, as flags. A group of `PretrainConfig`; docs/training.md shows what comes out."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_codec.errors import UserError, out_of_range


@dataclass(frozen=True)
class LoggingConfig:
    """What one watches."""

    log_interval: int = 10
    """Steps between log lines."""
    eval_interval: int = 1000
    """Steps between evaluations on held-out documents; one is always made at the end."""
    eval_iters: int = 100
    """Global batches of held-out documents, whole ones, in one evaluation; 0 switches it off."""
    tensorboard_dir: str | None = None
    """Folder for TensorBoard."""
    metrics_file: str | None = None
    """JSON lines for scripts: one a log interval and one an evaluation. Default: metrics.jsonl in --save."""
    peak_tflops: float | None = None
    """Dense peak of a device in TFLOP/s, for the MFU; known for A100, H100 and H200 (SXM) by their names."""
    sample_interval: int | None = None
    """Steps between pictures sampled from the model in training."""
    num_samples: int = 16
    """Pictures at each --sample-interval."""
    wandb_project: str | None = None
    """Project of Weights & Biases to log to."""
    wandb_exp_name: str | None = None
    """Name of the run in --wandb-project."""
    wandb_save_dir: str | None = None
    """Folder in which Weights & Biases keeps its files. Default: --save."""
    profile_steps: tuple[int, int] | None = None
    """Steps START to END (excluded, counted from 0) whose operators are timed and traced."""
    profile_ranks: tuple[int, ...] = (0,)
    """Processes that --profile-steps traces."""

    def faults(
        self, world_size: int, save: str | None, mock_data: bool, train_iters: int | None
    ) -> Iterator[UserError]:
        """What is out of range, or needs another flag.

        Args:
            save, mock_data: flags of other groups.
            train_iters: steps of the run, None where they are not known yet.
        """
        yield from out_of_range(self, 1, "log_interval", "eval_interval", "sample_interval", "num_samples")
        yield from out_of_range(self, 0, "eval_iters", "peak_tflops")
        if self.peak_tflops == 0:
            yield UserError(f"--peak-tflops {self.peak_tflops}", "must be above 0", "leave it out for no MFU")
        yield from self._sample_faults(save, mock_data)
        yield from self._profile_faults(world_size, save, train_iters)
        for name in ("wandb_exp_name", "wandb_save_dir"):
            value = getattr(self, name)
            if value is not None and not self.wandb_project:
                flag = f"--{name.replace('_', '-')} {value}"
                yield UserError(flag, "needs --wandb-project", "name a project with --wandb-project")

    def _sample_faults(self, save: str | None, mock_data: bool) -> Iterator[UserError]:
        if self.sample_interval is None:
            return
        flag = f"--sample-interval {self.sample_interval}"
        if mock_data:
            yield UserError(
                flag, "needs real data: --mock-data has no codec to decode with", "leave out one of the two"
            )
        if not (self.tensorboard_dir or save or self.wandb_project):
            yield UserError(
                flag,
                "needs a place for the pictures",
                "give --save, --tensorboard-dir or --wandb-project",
            )

    def _profile_faults(
        self, world_size: int, save: str | None, train_iters: int | None
    ) -> Iterator[UserError]:
        if self.profile_steps is None:
            return
        start, end = self.profile_steps
        flag = f"--profile-steps {start} {end}"
        if not 0 <= start < end:
            yield UserError(flag, "must be two steps, the first at least 0 and below the second", "use 10 12")
        elif train_iters is not None and end > train_iters:
            yield UserError(
                flag, f"must lie within the {train_iters} steps of the run", "choose earlier ones"
            )
        if not (self.tensorboard_dir or save):
            yield UserError(flag, "needs a place for the trace", "give --save or --tensorboard-dir")
        wrong = [rank for rank in self.profile_ranks if not 0 <= rank < world_size]
        if wrong or not self.profile_ranks:
            yield UserError(
                f"--profile-ranks {' '.join(map(str, self.profile_ranks))}".rstrip(),
                f"must name processes from 0 to {world_size - 1}",
                "leave it out for process 0",
            )
