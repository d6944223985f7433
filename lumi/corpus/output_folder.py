"""The folder that `prepare` writes into: what may be there, and that one run at a time is at work in it."""

import contextlib
import os
import re
import shutil
import signal
import sys
import threading
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

from lumi.config import UserError, to_dict
from lumi.corpus.cache import SourceCache
from lumi.corpus.folder import CorpusReader, Manifest, read_manifest
from lumi.corpus.prepare_config import PrepareConfig
from lumi.host.locks import lock_file
from lumi.host.storage import check_output

OURS = re.compile(
    r"shard-\d+-[0-9a-f]{8}\.parquet|DATA_CARD\.md|DATA_REPORT\.html|manifest\.json\.tmp-\d+"
    r"|\.cache|\.building"
)


def earlier_corpus(folder: Path, config: PrepareConfig, use_cache: bool) -> Manifest | None:
    """The manifest of the corpus that is there, or None.

    Raises UserError if this run must not or cannot replace it.
    """
    check_output(folder, renamed=False)
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    if manifest is None:
        foreign = sorted(path.name for path in folder.iterdir() if not OURS.fullmatch(path.name))
        if foreign:
            raise UserError(
                "--output-dir",
                "must be new, empty or a corpus folder",
                got=f"{folder} with {', '.join(foreign[:3])} in it",
            )
    elif manifest.get("config") != to_dict(config) and not use_cache:
        old = manifest.get("config", {})
        changed = sorted(key for key, value in to_dict(config).items() if old.get(key) != value)
        raise UserError(
            "--output-dir",
            "must not hold a corpus of another config",
            got=f"{folder} (made with other {', '.join(changed)})",
            remedy="choose another folder, or add --use-cache to replace it and reuse the unchanged sources",
        )
    return manifest


def is_up_to_date(folder: Path, manifest: Manifest, inputs_key: str) -> bool:
    """Whether the corpus that is there is whole and made from the same config and inputs."""
    if manifest.get("inputs_key") != inputs_key:
        return False
    try:
        CorpusReader(folder, manifest).verify()
    except UserError as error:
        print(f"lumi: {error}; it is made again", file=sys.stderr)
        return False
    return True


@contextlib.contextmanager
def lock(folder: Path) -> Iterator[None]:
    """One run at a time in a folder; the kernel drops the lock of a process that was killed."""
    (folder / ".cache").mkdir(parents=True, exist_ok=True)
    try:
        descriptor = lock_file(folder / ".cache" / "lock", 0.0, partial(print, file=sys.stderr))
    except BlockingIOError as error:
        raise UserError(
            "--output-dir",
            "must be used by one run at a time",
            got=f"{folder}, where another run is at work",
        ) from error
    try:
        yield
    finally:
        os.close(descriptor)


def sweep_cache(folder: Path, in_use: Collection[Path]) -> None:
    """Delete what runs of other configs left in the cache."""
    for path in (folder / ".cache").iterdir():
        if path.is_dir() and path not in in_use:
            shutil.rmtree(path)


def discard_caches(folder: Path, caches: Collection[SourceCache]) -> None:
    """Clear the caches; say so where they are what an interrupted run left."""
    if not (folder / "manifest.json").exists() and any(cache.folder.exists() for cache in caches):
        lost = f"{folder}: what an interrupted run left is discarded; --use-cache goes on from it"
        print(f"lumi: {lost}", file=sys.stderr)
    for cache in caches:
        cache.clear()


@contextlib.contextmanager
def full_disk_refused(folder: Path) -> Iterator[None]:
    """Raises UserError for a file that cannot be written."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"{error.filename or folder} cannot be written: {reason}",
            remedy="finished batches are kept: mend this, then run again with --use-cache",
        ) from error


@contextlib.contextmanager
def interruptible(writes: bool) -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, through every `finally`; a second one ends it at once."""

    def terminate(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise SystemExit(128 + signum)

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = "finished batches are kept, run again with --use-cache to go on"
        print(f"lumi: interrupted; {kept if writes else 'nothing was written'}", file=sys.stderr)
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
