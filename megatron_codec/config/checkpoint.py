"""Where checkpoints go and come from, as flags. A group of `PretrainConfig`."""

from collections.abc import Iterator
from dataclasses import dataclass

from megatron_codec.errors import UserError, out_of_range


@dataclass(frozen=True)
class CheckpointConfig:
    """Where checkpoints go and come from."""

    save: str | None = None
    """Folder for checkpoints."""
    load: str | None = None
    """Folder to go on from: its latest checkpoint, written under any layout."""
    save_interval: int | None = None
    """Steps between checkpoints; one is always written at the end."""
    finetune: bool = False
    """Take only the weights from --load, and start at step 0 with a fresh optimizer."""

    def faults(self) -> Iterator[UserError]:
        """Flags that need another one."""
        yield from out_of_range(self, 1, "save_interval")
        if self.save_interval is not None and self.save is None:
            yield UserError(
                f"--save-interval {self.save_interval}", "needs --save", "name a folder with --save"
            )
        if self.finetune and self.load is None:
            yield UserError("--finetune", "needs --load", "name the checkpoint whose weights to start from")
