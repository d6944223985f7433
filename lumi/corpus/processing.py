"""The work on one batch that needs no other batch: cleaning, filters and fingerprints. It runs in worker processes."""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import NamedTuple

from lumi.config import UserError
from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.deduplication import DeduplicationConfig, Fingerprint, fingerprint
from lumi.corpus.filters import FilterConfig, find_fault
from lumi.corpus.reading import Record

BATCH_DOCUMENTS = 1024
BATCH_CHARS = 4_000_000


class Recipe(NamedTuple):
    """Everything that decides what becomes of a record by itself."""

    cleaning: CleaningConfig
    filters: FilterConfig
    deduplication: DeduplicationConfig


class Outcome(NamedTuple):
    """What became of one record: `text` and `fingerprint`, or None with the reason (and the place, if it was malformed)."""

    text: str | None
    fingerprint: Fingerprint | None
    reason: str = ""
    detail: str = ""


def process_batch(records: list[Record], recipe: Recipe) -> list[Outcome]:
    """Clean, filter and fingerprint; one outcome per record, in order."""
    outcomes: list[Outcome | None] = []
    texts: list[str] = []
    for text, reason, detail in records:
        if text is not None:
            text, reason = _process(text, recipe)
        if reason:
            outcomes.append(Outcome(None, None, reason, detail))
        else:
            assert text is not None
            outcomes.append(None)
            texts.append(text)
    kept = iter(zip(texts, fingerprint(texts, recipe.deduplication), strict=True))
    return [Outcome(*next(kept)) if outcome is None else outcome for outcome in outcomes]


def _process(text: str, recipe: Recipe) -> tuple[str, str]:
    if len(text) > recipe.filters.max_chars:  # before any work: this is what makes a huge document cheap
        return "", "too_long"
    text = clean_text(text, recipe.cleaning)
    if not text or text.isspace():
        return "", "empty"
    return text, find_fault(text, recipe.filters)


def make_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Batches of BATCH_DOCUMENTS records or about BATCH_CHARS characters, whichever comes first."""
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += len(record.text or "")
        if len(batch) >= BATCH_DOCUMENTS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


class Workers:
    """`num_workers` processes, started when first needed; with one, the work is done in this process."""

    def __init__(self, num_workers: int) -> None:
        self.num_workers = num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def process(self, batches: Iterable[list[Record]], recipe: Recipe) -> Iterator[list[Outcome]]:
        """The outcomes of the batches in order, at most `num_workers` + 2 of them in memory at once.

        Raises:
            UserError: a worker process died.
        """
        if self.num_workers == 1:
            for batch in batches:
                yield process_batch(batch, recipe)
            return
        if self._pool is None:
            # Not fork: this process has threads (Arrow, progress), and a forked child may inherit their locks.
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, mp_context=spawn, initializer=_prepare_worker)
        pending: deque[Future[list[Outcome]]] = deque()
        try:
            for batch in batches:
                pending.append(self._pool.submit(process_batch, batch, recipe))
                if len(pending) >= self.num_workers + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--num-workers must leave each process enough memory, got {self.num_workers}: a worker process died;"
                " run again with --use-cache and fewer workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def _prepare_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A parent that was killed cannot end its workers, which would wait for work for ever.
    threading.Thread(target=_exit_with, args=(parent.sentinel,), daemon=True).start()


def _exit_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)
