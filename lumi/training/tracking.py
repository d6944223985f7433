"""Records on their way to trackers: a queue and a thread for each, so that none delays the loop."""

import os
import queue
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lumi.training.trackers import FINISH_SECONDS, TRACKERS, TrackedRun, Tracker, scalars_of

QUEUE_RECORDS = 20_000  # some 10 MB; a tracker that is further behind hangs
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSWORD", re.IGNORECASE)


class Tracking:
    """All trackers of one run. No method raises, or waits for a tracker; `finish` waits a little.

    Args:
        names: of `lumi.training.trackers.TRACKERS`.
        say: is told once of a tracker that fails; called from other threads.
        earlier: the records of the steps before those that the run does now.
    """

    def __init__(
        self,
        names: Sequence[str],
        run: TrackedRun,
        say: Callable[[str], None],
        earlier: Sequence[Mapping[str, Any]] = (),
    ):
        self._feeds = [_Feed(name, TRACKERS[name](), run, say, earlier) for name in names]

    def record(self, record: Mapping[str, Any]) -> None:
        """Pass on a record of `metrics.jsonl`."""
        for feed in self._feeds:
            feed.put(record)

    def finish(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        """Pass on the final figures and the picture; wait until everything is written, 30 s at most."""
        for feed in self._feeds:
            feed.end(step, figures, picture)
        deadline = time.monotonic() + FINISH_SECONDS + 1  # W&B gives up by itself just before
        for feed in self._feeds:
            feed.wait(max(deadline - time.monotonic(), 0))


class _Feed:
    """One tracker, its queue and its thread."""

    def __init__(
        self,
        name: str,
        tracker: Tracker,
        run: TrackedRun,
        say: Callable[[str], None],
        earlier: Sequence[Mapping[str, Any]],
    ):
        self._name, self._tracker, self._run, self._say, self._earlier = name, tracker, run, say, earlier
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(QUEUE_RECORDS)
        self._failed = self._ended = False
        self._held = run.resume_step
        self._once = threading.Lock()
        # A daemon: one that hangs must not keep the process alive.
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def put(self, record: Mapping[str, Any]) -> None:
        self._put(lambda: self._pass_on(record))

    def end(self, step: int, figures: Mapping[str, float], picture: Path) -> None:
        def finish() -> None:
            self._tracker.finish(step, figures, picture)
            self._ended = True

        self._put(finish)

    def wait(self, seconds: float) -> None:
        if self._failed:
            return
        self._thread.join(seconds)
        if self._thread.is_alive():
            self._fail(f"it was not done {FINISH_SECONDS:.0f} s after the end")

    def _put(self, work: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(work)
        except queue.Full:
            self._fail(f"it is {QUEUE_RECORDS:,} records behind")

    def _work(self) -> None:
        try:
            self._held = self._tracker.begin(self._run)
            # It may have been asked for only now, or have lost its last records in a kill.
            for record in self._earlier:
                if record["step"] > self._held:
                    self._tracker.record(record["step"], scalars_of(record))
            while not (self._failed or self._ended):
                self._queue.get()()
        except Exception as error:
            self._fail(f"{type(error).__name__}: {error}")

    def _pass_on(self, record: Mapping[str, Any]) -> None:
        step = record["step"]
        # A run that was killed does some steps again. A tracker that cannot forget them gets them once.
        if step <= self._run.resume_step or step > self._held:
            self._tracker.record(step, scalars_of(record))

    def _fail(self, reason: str) -> None:
        with self._once:
            if not self._failed:
                self._failed = True
                remains = "the run goes on without it, and metrics.jsonl has everything"
                self._say(f"warning: tracker {self._name}: {_without_secrets(reason)}; {remains}")


def _without_secrets(text: str) -> str:
    """The first line of an error, without what environment variables and addresses hold of keys."""
    first = (text.splitlines() or [""])[0][:300]
    for name, value in os.environ.items():
        if _SECRET_NAME.search(name) and len(value) >= 6:
            first = first.replace(value, "***")
    return re.sub(r"(?i)((?:key|token|password|secret)\w*=)[^&\s]+|(?<=//)[^/@\s]+(?=@)", r"\1***", first)
