"""An array in a file, of which pieces are read as they are asked for.

They are read, not mapped: a mapped file that shrinks, or a disk that fails, kills whoever touches the page by SIGBUS, without a word.
From the page cache both cost the same: about 2 us for 1,000 tokens.
"""

import os
import weakref
from pathlib import Path

import numpy as np

from lumi.config import UserError


class StoredArray:
    """The values that a file holds, one after another; `array[start:stop]` reads some of them, `array[:]` all.

    The file stays open: one that is removed or replaced meanwhile is still read as it was.

    Args:
        path, dtype, length: the file, and the type and number of its values.
        remedy: what helps where it cannot be read; the end of an error's message.
    """

    def __init__(self, path: str | Path, dtype: np.dtype, length: int, *, remedy: str):
        self.path, self.dtype, self.length, self.remedy = path, dtype, length, remedy
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, places: slice) -> np.ndarray:
        """The values [start, stop), read-only. Raises UserError: the file has become shorter, or the disk fails."""
        start, stop, step = places.indices(self.length)
        if step != 1:
            raise ValueError(f"places must be a slice of step 1, got {places}")
        return np.frombuffer(
            self._read(start * self.dtype.itemsize, max(0, stop - start) * self.dtype.itemsize),
            dtype=self.dtype,
        )

    def _read(self, offset: int, size: int) -> bytes:
        data = b""
        while len(data) < size:  # one read gives 2 GiB at most
            try:
                piece = os.pread(self._descriptor, size - len(data), offset + len(data))
            except OSError as error:
                raise UserError(f"{self.path}: cannot be read: {error.strerror}; {self.remedy}") from error
            if not piece:
                now = os.fstat(self._descriptor).st_size
                raise UserError(
                    f"{self.path}: must be {self.length * self.dtype.itemsize} bytes, got {now}: "
                    f"the file was truncated while it was in use; {self.remedy}"
                )
            data = data + piece if data else piece
        return data
