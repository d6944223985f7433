"""An array in a file, read piece by piece.

The file is not mapped: when a mapped file shrinks or its disk fails, SIGBUS kills whoever touches the page,
without a word.
From the page cache both cost the same: about 2 us for 1,000 tokens.
"""

import os
import sys
import threading
import weakref
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np

from lumi.config import UserError

_seeking = threading.Lock()


class FlatArray(ABC):
    """Values one after another, read piece by piece: `array[start:stop]` gives some of them, `array[:]` all.

    Args:
        dtype, length: type and number of the values.
    """

    def __init__(self, dtype: np.dtype, length: int) -> None:
        self.dtype, self.length = dtype, length

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> np.ndarray:
        """The values [start, stop), read-only. Raises UserError where they cannot be read."""
        start, stop, step = places.indices(self.length)
        if step != 1:
            raise ValueError(f"places must be a slice of step 1, got {places}")
        width = self.dtype.itemsize
        return np.frombuffer(self._read(start * width, max(0, stop - start) * width), dtype=self.dtype)

    @abstractmethod
    def _read(self, offset: int, size: int) -> bytes:
        """The bytes [offset, offset + size), which lie in the array."""


class StoredArray(FlatArray):
    """The values of a file, one after another. `array[start:stop]` reads some of them, `array[:]` all.

    The file stays open: if it is removed or replaced, the array still reads the old one.

    Args:
        path, dtype, length: the file, and the type and number of its values.
        remedy: what helps where the file cannot be read; it ends the error's message.
    """

    def __init__(self, path: str | Path, dtype: np.dtype, length: int, *, remedy: str) -> None:
        super().__init__(dtype, length)
        self.path, self.remedy = path, remedy
        self._descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0))
        weakref.finalize(self, os.close, self._descriptor)

    def _read(self, offset: int, size: int) -> bytes:
        """Raises UserError: the file was truncated, the disk fails."""
        data = b""
        while len(data) < size:  # one read gives at most 2 GiB
            try:
                piece = _read_at(self._descriptor, size - len(data), offset + len(data))
            except OSError as error:
                reason = f"{self.path}: cannot be read: {error.strerror}"
                raise UserError(reason, remedy=self.remedy) from error
            if not piece:
                now = os.fstat(self._descriptor).st_size
                raise UserError(
                    f"{self.path}:",
                    f"must be {self.length * self.dtype.itemsize} bytes",
                    got=f"{now}: the file was truncated while it was in use",
                    remedy=self.remedy,
                )
            data = data + piece if data else piece
        return data


def _read_at(descriptor: int, size: int, offset: int) -> bytes:
    """At most `size` bytes from `offset` on; threads may call it at the same time."""
    if sys.platform != "win32":
        return os.pread(descriptor, size, offset)
    with _seeking:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)
