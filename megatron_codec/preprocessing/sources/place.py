"""Where an item lies in a file, so that what is too large for the memory can be read piece by piece."""

import io
import os
from dataclasses import dataclass
from typing import IO, cast


@dataclass(frozen=True)
class Place:
    """Bytes `offset` to `offset + size` of a file; to its end if there is no size."""

    path: str
    offset: int = 0
    size: int | None = None

    @property
    def is_whole_file(self) -> bool:
        """Whether it is all of the file."""
        return self.offset == 0 and self.size is None

    def open(self) -> IO[bytes]:
        """The content, to be read in any order."""
        if self.is_whole_file:
            return open(self.path, "rb")
        return cast(IO[bytes], _Part(self))


class _Part(io.RawIOBase):
    """A part of a file as a file of its own."""

    def __init__(self, place: Place):
        self._file = open(place.path, "rb")  # noqa: SIM115  (closed by `close`)
        self._start = place.offset
        end = os.fstat(self._file.fileno()).st_size
        self._size = max(0, min(end - place.offset, end if place.size is None else place.size))
        self._position = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """See `io.RawIOBase`."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        """See `io.RawIOBase`."""
        return self._position

    def read(self, size: int = -1) -> bytes:
        """See `io.RawIOBase`."""
        left = max(0, self._size - self._position)
        self._file.seek(self._start + self._position)
        content = self._file.read(left if size is None or size < 0 else min(size, left))
        self._position += len(content)
        return content

    def readable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def seekable(self) -> bool:
        """See `io.RawIOBase`."""
        return True

    def close(self) -> None:
        """See `io.RawIOBase`."""
        self._file.close()
        super().close()
