"""Where a run's numbers and pictures go: JSON lines, picture files, TensorBoard, Weights & Biases."""

import importlib.util
import json
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from megatron_codec.config import PretrainConfig
from megatron_codec.errors import UserError
from megatron_codec.files import whole_file

WANDB_ID = "wandb_id.txt"  # beside the checkpoints, so that a run that goes on finds it


class Sink(Protocol):
    """One place for numbers and pictures; only the main process has any."""

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Writes numbers of a finished step, by their names."""
        ...

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        """Writes an RGB picture."""
        ...

    def close(self) -> None:
        """Ends writing."""
        ...


def faults(config: PretrainConfig) -> Iterator[UserError]:
    """Packages that a flag needs and that are not installed."""
    for flag, value, package, install in (
        ("--tensorboard-dir", config.logging.tensorboard_dir, "tensorboard", "tensorboard"),
        ("--wandb-project", config.logging.wandb_project, "wandb", "wandb"),
    ):
        if value and not _installed(package):
            rule = f"needs the package {package}, which is not installed"
            yield UserError(f"{flag} {value}", rule, f"pip install {install}")


def _installed(package: str) -> bool:
    # W&B writes into a folder ./wandb, which Python would take for a package without files.
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Sinks:
    """All places that the flags ask for.

    Args:
        first: steps done before this run.
    """

    def __init__(self, config: PretrainConfig, first: int):
        self._stack = ExitStack()
        self._sinks: list[Sink] = []
        settings, save = config.logging, config.checkpoint.save
        metrics_file = settings.metrics_file or (save and Path(save) / "metrics.jsonl")
        with ExitStack() as opened:  # what was opened is closed if the next cannot be
            if metrics_file:
                self._add(opened, JsonLines(Path(metrics_file), first))
            if save:
                self._add(opened, PictureFiles(Path(save)))
            if settings.tensorboard_dir:
                self._add(opened, TensorBoard(settings.tensorboard_dir, first))
            if settings.wandb_project:
                self._add(opened, WeightsAndBiases(config, first))
            self._stack = opened.pop_all()

    def _add(self, opened: ExitStack, sink: Sink) -> None:
        opened.callback(sink.close)
        self._sinks.append(sink)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.scalars(iteration, values)

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        """See `Sink`."""
        for sink in self._sinks:
            sink.picture(iteration, name, picture)

    def close(self) -> None:
        """Closes every place, also where another cannot be closed, and then raises what that one raised."""
        self._stack.close()


class JsonLines:
    """A JSON object a line, with `iteration`."""

    def __init__(self, path: Path, first: int):
        path.parent.mkdir(parents=True, exist_ok=True)
        _drop_lines_after(path, first)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115  closed by close()

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._file.write(json.dumps({"iteration": iteration, **values}) + "\n")
        self._file.flush()

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        """Has no place for pictures."""

    def close(self) -> None:
        self._file.close()


def _drop_lines_after(path: Path, iteration: int) -> None:
    """A run that goes on from a checkpoint repeats the steps after it, and must not write them twice."""
    if path.exists():
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["iteration"] <= iteration]
        if kept != lines:
            path.write_text("".join(kept), encoding="utf-8")


class PictureFiles:
    """SAVE/NAME/iter_0000100.png."""

    def __init__(self, save: Path):
        self._save = save

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        """Has no place for numbers."""

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        with whole_file(self._save / name / f"iter_{iteration:07d}.png") as stream:
            picture.save(stream, format="PNG")

    def close(self) -> None:
        """Every file is closed already."""


class TensorBoard:
    """Event files in a folder."""

    def __init__(self, folder: str, first: int):
        from torch.utils.tensorboard import SummaryWriter

        # What a run wrote after the checkpoint that this one goes on from is left out.
        self._board = SummaryWriter(folder, purge_step=first + 1 if first else None)

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._board.add_scalar(name, value, iteration)
        self._board.flush()

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        self._board.add_image(name, np.asarray(picture.convert("RGB")), iteration, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        self._board.close()


class WeightsAndBiases:
    """A run of W&B; a run that goes on from a checkpoint writes into the same one."""

    def __init__(self, config: PretrainConfig, first: int):
        import wandb  # pyright: ignore[reportMissingImports]  only where it is asked for

        settings, places = config.logging, config.checkpoint
        identity = _wandb_id(places.load) if first else None
        folder = settings.wandb_save_dir or places.save
        if folder:
            Path(folder).mkdir(parents=True, exist_ok=True)
        self._image = wandb.Image
        try:
            self._run = wandb.init(
                project=settings.wandb_project,
                name=settings.wandb_exp_name,
                dir=folder,
                id=identity,
                resume="allow" if identity else None,
                config=asdict(config),
            )
        except Exception as error:  # no key, no network, no such project: each has a type of its own
            raise UserError(
                f"--wandb-project {settings.wandb_project}",
                f"cannot be opened ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})",
                "run `wandb login` once, or set WANDB_MODE=offline and `wandb sync` later",
            ) from error
        # Not W&B's own steps: these may only grow, and a run that goes on repeats some.
        self._run.define_metric("iteration")
        self._run.define_metric("*", step_metric="iteration")
        if places.save:
            with whole_file(Path(places.save) / WANDB_ID, "w") as stream:
                stream.write(f"{self._run.id}\n")

    def scalars(self, iteration: int, values: dict[str, float]) -> None:
        self._run.log({"iteration": iteration, **values})

    def picture(self, iteration: int, name: str, picture: Image.Image) -> None:
        self._run.log({"iteration": iteration, name: self._image(picture)})

    def close(self) -> None:
        self._run.finish()


def _wandb_id(load: str | None) -> str | None:
    """The run's id beside the checkpoints in `load`, or beside the one that it is."""
    for folder in (Path(load), Path(load).parent) if load else ():
        path = folder / WANDB_ID
        if path.is_file() and re.fullmatch(r"\S+", text := path.read_text(encoding="utf-8").strip()):
            return text
    return None
