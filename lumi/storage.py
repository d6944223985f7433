"""Files on disk: hashes, the message when one is not what was written, glob patterns, and folders that are whole or absent."""

import contextlib
import glob
import hashlib
import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lumi.config import UserError

TEMPORARY_PREFIX = ".tmp-"
_DISPLACED = "-displaced"


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
        UserError: naming the file, what was expected, what is there, and `remedy`.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: is missing; {remedy}")
    size = path.stat().st_size
    if size != record["size"]:
        raise UserError(f"{path}: must be {record['size']} bytes, got {size}: the file is truncated or was changed; {remedy}")
    if check_hash and (sha256 := sha256_file(path)) != record["sha256"]:
        raise UserError(f"{path}: SHA-256 must be {record['sha256']}, got {sha256}: the file is corrupt; {remedy}")


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
        matches = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
        if not matches:
            raise UserError(
                f"paths must match at least one file, got {pattern!r} (looked from {os.getcwd()}); mend the path, or take it out"
            )
        found |= dict.fromkeys(matches)
    return list(found)


@contextlib.contextmanager
def atomic_folder(folder: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary sibling that becomes `folder` when the block ends without an exception, and disappears otherwise.

    The files are fsynced before the rename and the parent after it, so that a reader, even after a power cut, finds the whole
    folder or none. `folder` must not exist or be empty, unless `replace` is given: then the old one makes way at the last moment.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f"{TEMPORARY_PREFIX}{folder.name}-{os.getpid()}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        yield temporary
        for path in sorted(temporary.rglob("*")):
            _fsync(path)
        _fsync(temporary)
        if replace and folder.exists():
            displaced = temporary.with_name(temporary.name + _DISPLACED)
            os.rename(folder, displaced)
            os.rename(temporary, folder)
            shutil.rmtree(displaced)
        else:
            os.rename(temporary, folder)
        _fsync(folder.parent)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def sweep_temporaries(parent: str | Path) -> list[str]:
    """Remove what interrupted `atomic_folder` calls left in `parent`; returns the names removed.

    A folder that was moved aside for a new one that never came is put back.
    """
    swept = []
    for path in sorted(path for path in Path(parent).glob(f"{TEMPORARY_PREFIX}*") if path.is_dir()):
        name = path.name.removeprefix(TEMPORARY_PREFIX)
        original = path.with_name(name.removesuffix(_DISPLACED).rpartition("-")[0])
        if name.endswith(_DISPLACED) and not original.exists():
            os.rename(path, original)
        else:
            shutil.rmtree(path)
            swept.append(path.name)
    return swept


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
