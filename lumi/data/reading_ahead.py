"""Rows are read before their turn, so that what comes from afar is here when it is needed."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

STEPS = 8  # that are read ahead
THREADS = 32  # each waits for one block at a time: 30 ms each make about 1 GB/s


def reading_ahead(
    steps: Iterable[int], rows: Sequence[int], read: Callable[[int, int], object]
) -> Iterator[int]:
    """The same steps. Before one is given, threads begin to read the rows of those after it.

    A fault is no concern of theirs: who needs the row meets it too.

    Args:
        rows: of each step.
        read: (step, row); what it returns is dropped.
    """
    pool = ThreadPoolExecutor(THREADS, thread_name_prefix="reading-ahead")
    try:
        coming: deque[int] = deque()
        for step in steps:
            coming.append(step)
            for row in rows:
                pool.submit(read, step, row)
            if len(coming) > STEPS:
                yield coming.popleft()
        yield from coming
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
