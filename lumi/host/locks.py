"""A lock on a file that one process holds at a time; the file names the holder."""

import errno
import os
import socket
import time
from collections.abc import Callable
from pathlib import Path

_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)  # the answers of some network disks


def lock_file(path: str | Path, wait_seconds: float, say: Callable[[str], None]) -> int:
    """Lock a file for this process and write host and process id into it.

    The lock lasts until the returned descriptor is closed or the process ends. It is a POSIX record lock:
    forked children do not inherit it, and a process does not block itself.

    Args:
        wait_seconds: how long to wait for another process's lock.
        say: called when the wait begins, and when the disk or the system has no locks. Nothing is locked
            then.

    Raises:
        BlockingIOError: another process still holds the lock; `strerror` is what the file says of it.
    """
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        _wait_for_lock(descriptor, path, wait_seconds, say)
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, f"host {socket.gethostname()}, pid {os.getpid()}\n".encode())
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _wait_for_lock(
    descriptor: int, path: str | Path, wait_seconds: float, say: Callable[[str], None]
) -> None:
    try:
        import fcntl
    except ImportError:  # Windows
        say(f"{path}: cannot be locked on this system; take care that no second run writes there")
        return
    deadline = None
    while True:
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except OSError as error:
            if error.errno in _NO_LOCKS:
                reason = f"cannot be locked on this disk: {error.strerror}"
                say(f"{path}: {reason}; take care that no second run writes there")
                return
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                raise
        os.lseek(descriptor, 0, os.SEEK_SET)
        holder = os.read(descriptor, 200).decode(errors="replace").strip()
        if deadline is None:
            deadline = time.monotonic() + wait_seconds
            say(f"{path}: another process has it ({holder}): waiting up to {wait_seconds:.0f} s for its end")
        elif time.monotonic() > deadline:
            raise BlockingIOError(errno.EAGAIN, holder)
        time.sleep(0.1)
