"""SIGTERM and SIGINT while a run is at work."""

import os
import signal
import time


class StopSignal:
    """The two signals, within a `with` block, as a flag that the loop reads between steps; a second one stops at once."""

    def __init__(self):
        self.received, self.time = 0, 0.0

    def __enter__(self) -> "StopSignal":
        self.previous = {number: signal.signal(number, self._handle) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: object) -> None:
        now = time.monotonic()
        if not self.received:
            self.received, self.time = number, now
        elif now - self.time > 1.0:  # torchrun hands Ctrl-C on to processes that the terminal has already told: that is not a second one
            os._exit(128 + number)
