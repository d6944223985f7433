"""Work in other processes: a function over items, results in the items' order, a bounded number in memory.

Spawned, not forked: this process has threads (Arrow, progress, torch), and a forked child would inherit their locks.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from lumi.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Generic[Item, Result]):
    """`num_workers` processes that call `function(shared, item)`; with one, it is called in this process.

    Args:
        function: a module's function; its module is imported in every worker, so it should import little.
        shared: sent to each worker once.
        num_workers: at least 1. The processes start when they are first needed and end with the `with` block.
    """

    def __init__(self, function: Callable[[Any, Item], Result], shared: Any, num_workers: int):
        if num_workers < 1:
            raise UserError(f"--num-workers must be at least 1, got {num_workers}")
        self.function, self.shared, self.num_workers = function, shared, num_workers
        self._pool: ProcessPoolExecutor | None = None

    def __enter__(self) -> "Workers[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results in order, at most `num_workers` + 2 of them in memory at once. Raises UserError if a worker process dies."""
        if self.num_workers == 1:
            for item in items:
                yield self.function(self.shared, item)
            return
        if self._pool is None:
            spawn = multiprocessing.get_context("spawn")
            self._pool = ProcessPoolExecutor(self.num_workers, spawn, initializer=_start, initargs=(self.function, self.shared))
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._pool.submit(_call, item))
                if len(pending) >= self.num_workers + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                f"--num-workers must leave each process enough memory, got {self.num_workers}: a worker process died; use fewer workers"
            ) from error
        finally:
            for future in pending:
                future.cancel()


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: tuple[Callable[[Any, Any], Any], Any] | None = None  # of a worker process: set once, when it starts


def _start(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _work
    _work = function, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends its workers itself
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A parent that was killed cannot end its workers, which would wait for work for ever.
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _work is not None
    function, shared = _work
    return function(shared, item)
