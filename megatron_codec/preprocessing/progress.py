"""One line of progress for work whose number of items is not always known before."""

import sys
import time
from types import TracebackType

from tqdm import tqdm


class Progress:
    """Share done, items, items a second, skipped, time left.

    Args:
        title: what the line begins with.
        size: positions to be done, see `sources.base`.
        things: what the items are called.
    """

    def __init__(self, title: str, size: int, things: str, disable: bool = False):
        self._things = things
        self.items = self.skipped = 0
        self._before, self._started = 0, time.monotonic()
        form = "{desc}: {percentage:3.0f}%|{bar}| {postfix} [{elapsed}<{remaining}]"
        pause = 0.1 if sys.stderr.isatty() else 10.0  # seconds; a log is not for watching
        self._bar = tqdm(desc=title, total=size, bar_format=form, mininterval=pause, disable=disable)

    def resume(self, positions: int, items: int, skipped: int) -> None:
        """An earlier run did so many positions and items; they do not count into speed and time left."""
        self._before += items
        if not self._bar.disable:
            self._bar.initial += positions
        self.advance(positions, items, skipped)

    def advance(self, positions: int, items: int, skipped: int) -> None:
        """So many more positions and items are done; `skipped` of them gave nothing."""
        self.items += items
        self.skipped += skipped
        rate = (self.items - self._before) / max(1e-9, time.monotonic() - self._started)
        text = f"{self.items:,} {self._things}, {rate:,.0f}/s, {self.skipped:,} skipped"
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(positions)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
