"""Files on disk: hashes, the message when one is not what was written, glob patterns, folders that are whole or absent, and locks."""

import contextlib
import errno
import glob
import hashlib
import os
import re
import shutil
import socket
import stat
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from lumi.config import UserError

if sys.platform != "win32":
    import fcntl

TEMPORARY_PREFIX = ".tmp-"
REHEARSAL = f"{TEMPORARY_PREFIX}rehearsal"  # where preflight saves
_DISPLACED, _DISCARDED = "-displaced", "-discarded"
_OURS = re.compile(
    rf"{re.escape(TEMPORARY_PREFIX)}(?:rehearsal|(?P<name>.+)-(?:\d+(?P<displaced>{_DISPLACED})?|discarded))"
)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # some disks of clusters


class DamagedError(UserError):
    """A file is missing, cut short or changed: its content is wrong, and stays so however often it is read."""


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: str | Path) -> dict[str, Any]:
    """What a manifest says of a file: `size` in bytes and `sha256`."""
    return {"size": Path(path).stat().st_size, "sha256": sha256_file(path)}


def check_file(path: str | Path, record: dict[str, Any], *, remedy: str, check_hash: bool = True) -> None:
    """Compare a file with its record.

    Raises:
        DamagedError: naming the file, what was expected, what is there, and `remedy`.
        OSError: it cannot be read, which says nothing of its content.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise DamagedError(f"{path}: is missing; {remedy}")
    if (size := found.st_size) != record["size"]:
        raise DamagedError(
            f"{path}: must be {record['size']} bytes, got {size}: the file is truncated or was changed; {remedy}"
        )
    if check_hash and (sha256 := sha256_file(path)) != record["sha256"]:
        raise DamagedError(
            f"{path}: SHA-256 must be {record['sha256']}, got {sha256}: the file is corrupt; {remedy}"
        )


def check_patterns(paths: Sequence[str]) -> None:
    """Raises ValueError unless `paths` holds paths or glob patterns."""
    if not paths or "" in paths:
        raise ValueError(f"paths must hold at least one path or glob pattern, got {list(paths)}")


def matching_files(paths: Sequence[str]) -> list[str]:
    """The files that paths and glob patterns mean: in their order, the matches of each sorted, none twice.

    Raises:
        UserError: one matches no file.
    """
    found: dict[str, None] = {}
    for pattern in paths:
        matches = sorted(
            path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path)
        )
        if not matches:
            raise UserError(
                f"paths must match at least one file, got {pattern!r} (looked from {os.getcwd()}); mend the path, or take it out"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def make_folder(folder: str | Path) -> None:
    """Make a folder and its parents, where they are not there yet, so that a power cut does not undo it."""
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _fsync(path.parent)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `folder` when the block ends without an exception, and disappears otherwise.

    The files are fsynced before the rename and the parent after it, so that a reader, even after a power cut, finds the whole
    folder or none. `folder` must not exist or be empty, unless `replace` is given: then the old one makes way at the last moment.
    """
    folder = Path(folder)
    make_folder(folder.parent)
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _fsync(path)
        _fsync(temporary)
        displaced = temporary.with_name(temporary.name + _DISPLACED)
        if replace and folder.exists():
            os.rename(folder, displaced)
        os.rename(temporary, folder)
        _fsync(folder.parent)  # before the old one goes
        shutil.rmtree(
            displaced, ignore_errors=True
        )  # the new one is whole: what stays of the old one is litter, for the next sweep
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep_temporaries(parent: str | Path) -> list[str]:
    """Remove what interrupted `atomic_folder` and `discard_folders` calls and rehearsals left in `parent`; returns the names removed.

    A folder that was moved aside for a new one that never came is put back. Folders of other names are not ours to remove.
    """
    swept = []
    for path in sorted(
        path for path in Path(parent).glob(f"{TEMPORARY_PREFIX}*") if path.is_dir() and not path.is_symlink()
    ):
        ours = _OURS.fullmatch(path.name)
        if ours is None:
            continue
        if ours["displaced"] and not path.with_name(ours["name"]).exists():
            os.rename(path, path.with_name(ours["name"]))
        else:
            shutil.rmtree(path)
            swept.append(path.name)
    return swept


def discard_folders(parent: str | Path, names: Iterable[str]) -> list[str]:
    """Delete folders in `parent`, each of which is at any moment whole, or litter that is swept; and what earlier calls could not.

    Returns:
        a line for everything that could not be deleted, and why.
    """
    parent, faults = Path(parent), []
    for name in names:
        try:
            os.rename(parent / name, parent / f"{TEMPORARY_PREFIX}{name}{_DISCARDED}")
        except OSError as error:
            faults.append(f"{parent / name}: cannot be removed: {error.strerror}")
    for litter in sorted(parent.glob(f"{TEMPORARY_PREFIX}*{_DISCARDED}")):
        try:
            shutil.rmtree(litter)
        except OSError as error:
            faults.append(f"{litter}: cannot be removed: {error.strerror}")
    return faults


def lock_file(path: str | Path, wait_seconds: float, say: Callable[[str], None]) -> int:
    """Lock a file for this process until the returned descriptor is closed or the process ends, and write host and process into it.

    A record lock of POSIX: children that are forked have no part in it, and a process does not stand in its own way.

    Args:
        wait_seconds: how long to wait for another process's lock.
        say: is told of the wait; and where the disk has no locks, so that nothing is locked.

    Raises:
        BlockingIOError: another process still has it; its text is who.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if sys.platform != "win32":
            _wait_for_lock(descriptor, path, wait_seconds, say)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode(), 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait_for_lock(
    descriptor: int, path: str | Path, wait_seconds: float, say: Callable[[str], None]
) -> None:
    deadline = None
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                say(
                    f"{path}: cannot be locked on this disk: {error.strerror}; take care that no second run writes there"
                )
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip()
        if deadline is None:
            deadline = time.monotonic() + wait_seconds
            say(f"{path}: another process has it ({holder}): waiting up to {wait_seconds:.0f} s for its end")
        elif time.monotonic() > deadline:
            raise BlockingIOError(errno.EAGAIN, holder)
        time.sleep(0.1)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
