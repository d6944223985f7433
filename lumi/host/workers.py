"""Work in other processes or threads: a function over items, results in the items' order, a bounded number in memory.

Processes are spawned, not forked: this one has threads (Arrow, progress, torch), and a forked child would inherit their locks.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, Generic, TypeVar

from lumi.config import UserError

Item = TypeVar("Item")
Result = TypeVar("Result")


class Workers(Generic[Item, Result]):
    """`num_workers` processes, or threads, that call `function(shared, item)`; with one, it is called right here.

    Args:
        function: a module's function; its module is imported in every process, so it should import little.
        shared: sent to each process once.
        num_workers: at least 1. They start when they are first needed and end with the `with` block.
        threads: for functions that spend their time outside the interpreter's lock: threads start at once and copy nothing.
    """

    def __init__(
        self, function: Callable[[Any, Item], Result], shared: Any, num_workers: int, *, threads: bool = False
    ):
        if num_workers < 1:
            raise UserError(f"--num-workers must be at least 1, got {num_workers}")
        self.function, self.shared, self.num_workers, self.threads = function, shared, num_workers, threads
        self._pool: Executor | None = None

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
            self._pool = self._start_pool()
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._submit(item))
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

    def _start_pool(self) -> Executor:
        if self.threads:
            return ThreadPoolExecutor(self.num_workers)
        spawn = multiprocessing.get_context("spawn")
        return ProcessPoolExecutor(
            self.num_workers, spawn, initializer=_start, initargs=(self.function, self.shared)
        )

    def _submit(self, item: Item) -> Future[Result]:
        assert self._pool is not None
        return (
            self._pool.submit(self.function, self.shared, item)
            if self.threads
            else self._pool.submit(_call, item)
        )


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: tuple[Callable[[Any, Any], Any], Any] | None = None  # of a worker process: set once, when it starts


def _start(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _work
    _work = function, shared
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches the whole group; the parent ends its workers itself
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
