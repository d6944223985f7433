"""A function over many items in processes or threads: results in the items' order, few in memory at a time.

Processes are spawned, not forked: this process has threads (Arrow, progress, torch), and a forked child would
inherit their locks.
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
    """`num_workers` processes, or threads, that call `function(shared, item)`. One is the calling thread.

    Workers start at the first `map` and end with the `with` block.

    Args:
        function: defined in a module, which each process imports; the module should import little.
        shared: sent to each process once.
        num_workers: at least 1.
        threads: use threads, for a function that releases the interpreter's lock. They start at once and copy
            nothing.
    """

    def __init__(
        self, function: Callable[[Any, Item], Result], shared: Any, num_workers: int, *, threads: bool = False
    ) -> None:
        if num_workers < 1:
            raise UserError("--num-workers", "must be at least 1", got=num_workers)
        self.function, self.shared, self.num_workers, self.threads = function, shared, num_workers, threads
        self._pool: Executor | None = None

    def __enter__(self) -> "Workers[Item, Result]":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def map(self, items: Iterable[Item]) -> Iterator[Result]:
        """The results in order, at most `num_workers` + 2 in memory. Raises UserError if a process dies."""
        if self.num_workers == 1:
            for item in items:
                yield self.function(self.shared, item)
            return
        if self._pool is None:
            self._pool = self._start_pool()
        pending: deque[Future[Result]] = deque()
        try:
            for item in items:
                pending.append(self._submit(self._pool, item))
                if len(pending) >= self.num_workers + 2:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "--num-workers",
                "must leave each process enough memory",
                got=f"{self.num_workers}: a worker process died",
                remedy="use fewer workers",
            ) from error
        finally:
            for future in pending:
                future.cancel()

    def _start_pool(self) -> Executor:
        if self.threads:
            return ThreadPoolExecutor(self.num_workers)
        spawn = multiprocessing.get_context("spawn")
        shared = (self.function, self.shared)
        return ProcessPoolExecutor(self.num_workers, spawn, initializer=_start, initargs=shared)

    def _submit(self, pool: Executor, item: Item) -> Future[Result]:
        if self.threads:
            return pool.submit(self.function, self.shared, item)
        return pool.submit(_call, item)


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_work: tuple[Callable[[Any, Any], Any], Any] | None = None  # of a worker process, set once when it starts


def _start(function: Callable[[Any, Any], Any], shared: Any) -> None:
    global _work
    _work = function, shared
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent ends its workers itself
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A parent that is killed cannot end its workers: they would wait for work for ever.
    threading.Thread(target=_exit_after, args=(parent.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _call(item: Any) -> Any:
    assert _work is not None
    function, shared = _work
    return function(shared, item)
