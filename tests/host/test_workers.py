import multiprocessing
import threading

import pytest

from lumi.config import UserError
from lumi.host.workers import Workers, num_cores


def scale(factor, item):
    if item == 99:
        raise UserError("item must not be 99")
    return factor * item


def thread_name(_, item):
    return threading.current_thread().name


@pytest.mark.parametrize(("num_workers", "threads"), [(1, False), (2, False), (3, True)])
def test_results_in_order_and_errors_raised(num_workers, threads):
    with Workers(scale, 3, num_workers, threads=threads) as workers:
        assert list(workers.map(range(50))) == [3 * i for i in range(50)]
        assert list(workers.map([])) == []
        with pytest.raises(UserError, match="item must not be 99"):
            list(workers.map([1, 99, 2]))


def test_little_is_read_ahead():
    taken = []

    def items():
        for item in range(20):
            taken.append(item)
            yield item

    with Workers(scale, 1, 2, threads=True) as workers:
        results = workers.map(items())
        assert next(results) == 0
        assert len(taken) == 4
        results.close()


def test_threads_are_threads_and_one_worker_is_this_thread():
    with Workers(thread_name, None, 2, threads=True) as workers:
        assert all("ThreadPool" in name for name in workers.map(range(4)))
    with Workers(thread_name, None, 1) as workers:
        assert set(workers.map(range(4))) == {threading.current_thread().name}


def test_a_process_that_dies_is_a_user_error():
    with Workers(scale, 1, 2) as workers:
        results = workers.map(range(100))
        next(results)
        for process in multiprocessing.active_children():
            process.kill()
        with pytest.raises(
            UserError,
            match="--num-workers must leave each process enough memory, got 2: a worker process died",
        ):
            list(results)


def test_refuses_none():
    with pytest.raises(UserError, match="--num-workers must be at least 1, got 0"):
        Workers(scale, 1, 0)
    assert num_cores() >= 1
