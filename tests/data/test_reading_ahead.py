"""Rows that are read before their turn."""

import threading
import time

from lumi.data.reading_ahead import STEPS, reading_ahead


def test_the_rows_of_further_steps_are_read_before_a_step_is_given():
    read, come = set(), threading.Condition()

    def note(step, row):
        with come:
            read.add((step, row))
            come.notify_all()

    steps = reading_ahead(range(1, 31), [4, 5], note)
    assert next(steps) == 1
    ahead = {(step, row) for step in range(1, 2 + STEPS) for row in (4, 5)}
    with come:
        assert come.wait_for(lambda: read == ahead, timeout=10)
    assert list(steps) == list(range(2, 31))


def test_fewer_steps_than_are_read_ahead():
    assert list(reading_ahead([5, 6], [0], lambda step, row: None)) == [5, 6]


def test_faults_are_left_to_those_who_need_the_row():
    def fail(step, row):
        raise OSError("not now")

    assert list(reading_ahead(range(20), [0, 1], fail)) == list(range(20))


def test_an_early_end_does_not_wait():
    held = threading.Event()
    steps = reading_ahead(range(100), range(50), lambda step, row: held.wait(20))
    assert next(steps) == 0
    begun = time.monotonic()
    steps.close()
    assert time.monotonic() - begun < 10
    held.set()
