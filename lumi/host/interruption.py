"""SIGTERM and SIGINT during a run."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator


class Interrupted(BaseException):
    """A signal came during work that has nothing to save.

    Like KeyboardInterrupt it is no Exception, so that no `except Exception` swallows it.

    Attributes:
        number: the signal's.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number = number

    def __reduce__(self) -> tuple[type["Interrupted"], tuple[int]]:  # processes tell each other of it
        return Interrupted, (self.number,)


class StopSignal:
    """Handles both signals within a `with` block of the main thread, which lasts as long as the run.

    The first signal sets `received`, a flag that a loop reads between steps. Within `interrupting` it also
    ends the work at once. A second signal ends the process.
    """

    def __init__(self) -> None:
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
        """Within the block a signal raises Interrupted; at its start, so does a signal that came before.

        The block's work has nothing to save and cleans up when an exception passes through it: reading,
        tokenizing. It must not be work that other processes wait for, such as a collective of torch: they
        would wait for ever. Blocks nest.

        Raises:
            Interrupted: in the main thread, at any place in the block.
        """
        self._depth += 1
        try:
            self._raise_if_received()
            yield
            self._raise_if_received()  # a signal may come in a `__del__`, whose exceptions Python drops
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
        # The terminal sends Ctrl-C to every process, and torchrun repeats it: that is no second signal.
        elif now - self.time > 1.0:
            os._exit(128 + number)
