"""Blocks of files in a folder of a bounded size. The processes of a machine share it.

A block is a file, renamed into its place when it is whole. Those used the longest time ago go first.
"""

import contextlib
import os
import threading
import time
from pathlib import Path

from lumi.host.storage import make_folder

DEFAULT_BYTES = 64 * 10**9
_CHECKS = 128  # a process looks at the size of the folder each time it has added this part of the limit
_KEPT = 7 / 8  # of the limit is left then, so that several processes together stay below it
_LITTER_NS = 600 * 10**9  # after that, what is not renamed yet is of a process that was killed


class BlockCache:
    """Blocks by the name of their file and their number.

    Args:
        folder: of nothing else.
        limit: bytes that all of them may take.
    """

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder, self.limit = folder, limit
        self._unchecked = limit  # bytes added since the last look; so the first block looks
        self._lock = threading.Lock()

    def read(self, name: str, number: int, start: int = 0, stop: int | None = None) -> bytes | None:
        """The bytes [start, stop) of a block, up to its end if None; None: it is not here."""
        path = self._path(name, number)
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                data = file.read(-1 if stop is None else stop - start)
            os.utime(path)  # used last now
        except FileNotFoundError:  # never here, or another process has made room
            return None
        return data

    def add(self, name: str, number: int, block: bytes) -> None:
        """Put a block into the folder, and make room where that is needed."""
        path = self._path(name, number)
        make_folder(path.parent)
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}-{threading.get_ident()}")
        try:
            temporary.write_bytes(block)
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        with self._lock:
            self._unchecked += len(block)
            if self._unchecked * _CHECKS < self.limit:
                return
            self._unchecked = 0
        self._make_room()

    def _path(self, name: str, number: int) -> Path:
        return self.folder / name / f"{number:08d}"

    def _make_room(self) -> None:
        files = []
        for name in os.scandir(self.folder):
            for file in os.scandir(name.path):
                with contextlib.suppress(FileNotFoundError):
                    found = file.stat()
                    files.append((found.st_mtime_ns, found.st_size, file.path))
        total = sum(size for _, size, _ in files)
        writing = time.time_ns() - _LITTER_NS
        for used, size, path in sorted(files):
            if total <= self.limit * _KEPT:
                return
            if ".tmp-" in Path(path).name and used > writing:
                continue
            Path(path).unlink(missing_ok=True)
            total -= size
