"""SIGTERM and SIGINT while a run is at work."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator


class Interrupted(BaseException):
    """A signal came during work that has nothing to save. Like KeyboardInterrupt no Exception: nobody's `except Exception` swallows it.

    `number` is the signal's.
    """

    def __init__(self, number: int):
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:  # processes tell each other of it
        return Interrupted, (self.number,)


class StopSignal:
    """The two signals, within a `with` block of the main thread, which lasts as long as the run.

    The first one sets `received`, a flag that a loop reads between steps; within `interrupting` it also ends the work at once. A second
    one ends the process.
    """

    def __init__(self):
        self.received, self.time = 0, 0.0
        self._depth = 0  # of `interrupting` blocks

    def __enter__(self) -> "StopSignal":
        self.previous = {
            number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)
        }
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    @contextlib.contextmanager
    def interrupting(self) -> Iterator[None]:
        """Within the block, whose work has nothing to save and cleans up behind an exception, a signal raises Interrupted.

        So does one that came before. For the main thread's own work, such as reading and tokenizing: not for what other processes wait
        for, as in a collective of torch, which would never come to its end. Blocks may be nested.

        Raises:
            Interrupted: in the main thread, at any place in the block.
        """
        self._depth += 1
        try:
            self._raise_if_received()
            yield
            self._raise_if_received()  # Python prints and forgets what is raised within a `__del__`, and a signal may come there
        finally:
            self._depth -= 1

    def _raise_if_received(self) -> None:
        if self.received:
            raise Interrupted(self.received)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self.time = number, now
            if self._depth:
                raise Interrupted(number)
        elif (
            now - self.time > 1.0
        ):  # torchrun hands Ctrl-C on to processes that the terminal has already told: that is not a second one
            os._exit(128 + number)
