"""Files and folders on disk: hashes, the error for a damaged file, and folders that are whole or absent.

`atomic_folder` writes into a sibling named `.tmp-NAME-PID` and renames it; behind a symbolic link, into a
sibling of what it leads to. A folder that is replaced waits as `.tmp-NAME-PID-displaced`, one that is deleted
as `.tmp-NAME-discarded`. Whatever a killed process leaves under such a name is litter, and a later run sweeps
it.
"""

import contextlib
import hashlib
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from lumi.config import UserError

TEMPORARY_PREFIX = ".tmp-"
REHEARSAL = f"{TEMPORARY_PREFIX}rehearsal"  # where preflight saves
_DISPLACED, _DISCARDED = "-displaced", "-discarded"
_OURS = re.compile(
    rf"{re.escape(TEMPORARY_PREFIX)}(?:rehearsal|(?P<name>.+)-(?:\d+(?P<displaced>{_DISPLACED})?|discarded))"
)


class DamagedError(UserError):
    """A file is missing, truncated or changed. Reading it again does not help, unlike after an OSError."""


class MissingError(DamagedError):
    """A file is missing."""


def sha256_file(path: str | Path) -> str:
    """SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_record(path: str | Path) -> dict[str, Any]:
    """A manifest's entry for a file: `size` in bytes and `sha256`."""
    return {"size": Path(path).stat().st_size, "sha256": sha256_file(path)}


def check_file(path: str | Path, record: dict[str, Any], *, remedy: str, check_hash: bool = True) -> None:
    """Compare a file with its record.

    Raises:
        DamagedError: names the file, what was expected, what is there, and `remedy`.
        OSError: the file cannot be read; its content may be intact.
    """
    path = Path(path)
    try:
        found = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        found = None
    if found is None or not stat.S_ISREG(found.st_mode):
        raise MissingError(f"{path}: is missing", remedy=remedy)
    if (size := found.st_size) != record["size"]:
        got = f"{size}: the file is truncated or was changed"
        raise DamagedError(f"{path}:", f"must be {record['size']} bytes", got=got, remedy=remedy)
    if check_hash and (sha256 := sha256_file(path)) != record["sha256"]:
        got = f"{sha256}: the file is corrupt"
        raise DamagedError(f"{path}: SHA-256", f"must be {record['sha256']}", got=got, remedy=remedy)


def make_folder(folder: str | Path) -> None:
    """Make a folder and its missing parents, so that they survive a power cut."""
    folder = Path(folder)
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        _fsync(path.parent)


def check_output(folder: str | Path, *, renamed: bool, option: str = "--output-dir") -> None:
    """Check, before the work, that results can go into a folder, which need not exist yet.

    Args:
        renamed: `atomic_folder` will put the whole folder in its place; a mount point cannot be replaced.
        option: what the user named the folder by.

    Raises:
        UserError: it is or lies in a file, cannot be written to, or is a mount point.
    """
    real = _real(folder)
    there = next(path for path in (real, *real.parents) if path.exists())
    if not is_writable(there):
        what = "a folder that cannot be written to" if there.is_dir() else "a file"
        raise UserError(option, "must be a folder that can be written to", got=f"{folder}: {there} is {what}")
    if not renamed or real != there:
        return
    if _is_mount_point(real):
        why = "a mount point"
    elif not is_writable(real.parent):
        why = f"in {real.parent}, which cannot be written to"
    else:
        return
    expectation, remedy = "must be a folder that can be replaced", f"choose one inside it: {folder}/output"
    raise UserError(option, expectation, got=f"{folder}, {why}", remedy=remedy)


def check_output_file(
    path: str | Path, expected: str, may_replace: Callable[[Path], bool], option: str = "--output"
) -> None:
    """Check, before the work, that a file can be written, and that nothing of the user's is lost by it.

    Args:
        expected: what may be there, as in "new or empty".
        may_replace: whether the file that is there may go. Behind a link it is what that leads to.

    Raises:
        UserError: it is a folder, something else is there, or its folder is missing or takes no files.
    """
    path, real = Path(path), _real(path)
    if path.is_dir():
        raise UserError(option, "must be a file", got=f"the folder {path}")
    if os.path.lexists(real) and not (real.exists() and may_replace(real)):  # also a link to itself
        got, remedy = f"{path}, a file that would be lost", "remove it or choose another"
        raise UserError(option, f"must be {expected}", got=got, remedy=remedy)
    if path.exists() and not path.is_file():  # a device or a pipe
        return
    try:
        tempfile.TemporaryFile(dir=real.parent).close()  # permissions do not say it all, as in /proc
    except OSError as error:
        expectation, remedy = "must be a file in a folder that takes files", "make it or choose another"
        raise UserError(option, expectation, got=path, remedy=remedy) from error


def is_empty(file: Path) -> bool:
    """Whether nothing is lost when a file is written anew. Devices and pipes are empty."""
    return file.stat().st_size == 0


def is_writable(folder: Path) -> bool:
    """Whether a folder is there and files can be made in it."""
    return folder.is_dir() and os.access(folder, os.W_OK | os.X_OK)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling, which becomes `folder` when the block ends and disappears if it raises.

    The files are fsynced before the rename and the parent after it. So a reader finds the whole folder or
    none, even after a power cut. `folder` must not exist, or be empty; with `replace` an existing one is
    displaced at the end. A symbolic link stays one: what it leads to is made or displaced.
    """
    folder = _real(folder)
    make_folder(folder.parent)
    temporary = _temporary(folder)
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
        _fsync(folder.parent)  # before the old folder goes
        shutil.rmtree(displaced, ignore_errors=True)  # the new one is whole: a later sweep takes what remains
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep_temporaries(parent: str | Path) -> list[str]:
    """Remove what interrupted calls of this module and rehearsals left in `parent`; return the names removed.

    A displaced folder whose successor never came is put back. Folders of other names stay. No other process
    may be at work in `parent`.
    """
    swept = []
    for path in sorted(Path(parent).glob(f"{TEMPORARY_PREFIX}*")):
        ours = _OURS.fullmatch(path.name)
        if ours is None or path.is_symlink() or not path.is_dir():
            continue
        if ours["displaced"] and not path.with_name(ours["name"]).exists():
            os.rename(path, path.with_name(ours["name"]))
        else:
            shutil.rmtree(path)
            swept.append(path.name)
    return swept


def sweep_dead(folder: str | Path) -> None:
    """Remove what dead processes left when they made or removed `folder`. Live processes keep theirs."""
    folder = _real(folder)
    for litter in folder.parent.glob(f"{TEMPORARY_PREFIX}*"):
        pid = litter.name.removeprefix(f"{TEMPORARY_PREFIX}{folder.name}-")
        if litter.is_dir() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(litter)


def remove_folder(folder: str | Path) -> None:
    """Rename a folder and delete it. `sweep_dead` takes what an interrupted call leaves."""
    folder = _real(folder)
    temporary = _temporary(folder)
    os.rename(folder, temporary)
    shutil.rmtree(temporary)


def discard_folders(parent: str | Path, names: Iterable[str]) -> list[str]:
    """Rename folders in `parent` and delete them, and what earlier calls could not delete.

    Returns:
        one line for each that could not be deleted, with the reason.
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


def _real(folder: str | Path) -> Path:
    """Where a folder is or will be, behind all symbolic links. Renaming within one disk needs that."""
    return Path(os.path.realpath(folder))


def _is_mount_point(folder: Path) -> bool:
    """Also one that is bound to a folder of the same disk, which `os.path.ismount` does not see."""
    if os.path.ismount(folder):
        return True
    try:
        lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:  # not on Linux
        return False
    escaped = re.sub(r"[\\\s]", lambda match: f"\\{ord(match[0]):03o}", str(folder))
    return escaped in {line.split(" ")[4] for line in lines}


def _temporary(folder: Path) -> Path:
    return folder.with_name(f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}")


def _is_alive(pid: int) -> bool:
    if sys.platform == "win32":  # there os.kill(pid, 0) is Ctrl-C; so no process counts as dead
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        pass
    return True


def _fsync(path: Path) -> None:
    if sys.platform == "win32":  # which syncs only files that are open for writing, and no folders
        if path.is_dir():
            return
        flags = os.O_RDWR
    else:
        flags = os.O_RDONLY
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
