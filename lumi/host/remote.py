"""Files in a folder behind a URL, by fsspec: s3://, gs://, hf://, memory:// and whatever else it opens.

What fails is tried again, each time after a longer wait, and then named in one line. fsspec is imported where
a URL is opened, and nowhere else.
"""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from lumi.config import UserError
from lumi.host.storage import MissingError

WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)  # seconds before each further try
_FOR_GOOD = (FileNotFoundError, NotADirectoryError, PermissionError)  # another try gives the same

Result = TypeVar("Result")


class RemoteFolder:
    """The files in the folder behind a URL. Several threads may read at a time.

    Raises:
        UserError: fsspec does not know the protocol, or lacks a package for it.
    """

    def __init__(self, url: str) -> None:
        import fsspec  # here: only those need it who give a URL

        self.url = url.rstrip("/")
        try:
            self._files, self._folder = fsspec.url_to_fs(self.url)
        except ImportError as error:
            remedy = "for s3:// run: pip install 'lumi-train[remote]'; else install what it names"
            raise UserError(f"{url}:", "must have its package installed", got=error, remedy=remedy) from error
        except ValueError as error:
            expectation = "must be a URL that fsspec opens, such as s3://bucket/folder"
            raise UserError(f"{url}:", expectation, got=error) from error

    def fetch(self, name: str, path: Path, check: Callable[[Path], None] = lambda path: None) -> None:
        """Copy a file. A reader of `path` sees the old file or the whole new one.

        Args:
            check: raises UserError where the copy is not what it must be; then it is fetched again.

        Raises:
            UserError: it cannot be fetched, after several tries; MissingError: it is not there.
        """
        temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")

        def get() -> None:
            try:
                self._files.get_file(f"{self._folder}/{name}", str(temporary))
                check(temporary)
                os.replace(temporary, path)
            finally:
                temporary.unlink(missing_ok=True)

        self._retry(name, get)

    def read(self, name: str, start: int, stop: int, check: Callable[[bytes], None]) -> bytes:
        """The bytes [start, stop) of a file. `check` and errors as in `fetch`."""

        def get() -> bytes:
            data = self._files.cat_file(f"{self._folder}/{name}", start=start, end=stop)
            check(data)
            return data

        return self._retry(name, get)

    def _retry(self, name: str, get: Callable[[], Result]) -> Result:
        for wait in (*WAITS, None):
            try:
                return get()
            except _FOR_GOOD as error:
                kind = UserError if isinstance(error, PermissionError) else MissingError
                what = "cannot be read" if isinstance(error, PermissionError) else "is missing"
                raise kind(
                    f"{self.url}/{name}: {what}", remedy="check the URL and who may read it"
                ) from error
            except Exception as error:  # each protocol has its own
                if wait is None:
                    reason = " ".join(f"{type(error).__name__}: {error}".split())
                    tries = f"cannot be fetched, after {len(WAITS) + 1} tries"
                    raise UserError(
                        f"{self.url}/{name}: {tries}: {reason}", remedy="see that it can be reached"
                    ) from error
                time.sleep(wait)
        raise AssertionError("the last try returns or raises")
