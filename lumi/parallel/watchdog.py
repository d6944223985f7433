"""A run that hangs is stopped, and what it hangs on is named.

A process whose loop has stopped (a dead disk, a lost machine, a deadlock) makes all others wait for it in the next collective, without a
word. So every process tells the others through the store of its process group where its loop stands, and whoever has waited too long
looks for the one that is behind, prints one line about it, and ends all.
"""

import json
import os
import secrets
import socket
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from types import FrameType
from typing import NamedTuple

import torch
import torch.distributed as dist

from lumi.parallel.blame import Beat, Blame, describe, find_blame

EXIT_HUNG = 75  # sysexits.h: EX_TEMPFAIL, a failure that another try may mend
_SILENT_BEATS, _SILENT_SECONDS = (
    5,
    10.0,
)  # a process whose beat has not changed for as many of ours, and as long, no longer runs
_SILENT_IN_PATIENCE = 3  # times as long: a save can starve a machine
_LOOKS = 3  # beats are as old as their interval: what was seen once may be the very moment in which all go on
_FOREIGN = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib"))
_LUMI = os.path.dirname(os.path.abspath(__file__)) + os.sep


class Place(NamedTuple):
    """Where a loop stands: the `mark`-th mark of a step. `patient`: what it does now may take long."""

    step: int
    mark: int
    phase: str
    patient: bool


class Watchdog:
    """Ends the processes of `group` when one hangs: a `with` block around the loop, which says `mark(step, phase)` where it goes on.

    The processes must make the same marks in the same order. Two threads live within the block: one speaks with the store, the other
    counts the time and sees whether the first still gets an answer (a store on a stopped machine answers never, with no time-out).

    A process that has made no mark for `limit_seconds` looks at the others. A part of the loop under `patience` may take longer, as long
    as the `progress` of any process moves. Time in which this process itself did not run (a suspended job) does not count. With one
    process there is nobody to wait for, and nothing is watched.

    Args:
        group: all processes, on gloo; joined by `with`, which waits until all have come.
        limit_seconds: the longest that a mark may take, and that `progress` may stand still. The run ends at most a tenth of it and 40 s
            later.
        on_stop: called with the message, by the one process that prints it, from another thread than the loop's; it is given
            `max(5, limit_seconds / 10)` seconds at most.
        progress: of this process's work behind its loop: how much it has done of what the others wait for, and anything that moves
            meanwhile. Called from another thread than the loop's. None: nobody knows, and patience has no end.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        limit_seconds: float,
        on_stop: Callable[[str], None],
        progress: Callable[[], tuple[int, int]] | None = None,
    ):
        self._group, self._limit, self._on_stop, self._progress = group, limit_seconds, on_stop, progress
        self._rank, self._size = group.rank(), group.size()
        self._interval, self._tell_seconds = min(limit_seconds / 20, 5.0), max(5.0, limit_seconds / 10)
        self._place, self._patience = Place(0, 0, "starting", False), 0
        self._counted = self._place, 0.0  # a mark, and for how many seconds it has been the last
        self._parts, self._idle = 0, 0.0  # of the progress, and for how many seconds it has stood still
        self._count, self._left = 0, ""
        self._leaving, self._answered = threading.Event(), threading.Event()
        self._counts, self._unchanged = [-1] * self._size, [0] * self._size
        self._blame: Blame | None = None
        self._looks, self._stopping = 0, False
        self._threads: list[threading.Thread] = []

    def mark(self, step: int, phase: str) -> None:
        """Say that the loop goes on. Costs about a microsecond.

        Args:
            step: the optimizer step, never less than before.
            phase: what comes now, for the message, such as "waiting for data".
        """
        self._place = Place(
            step, self._place.mark + 1 if step == self._place.step else 0, phase, self._patience > 0
        )

    @contextmanager
    def patience(self, phase: str) -> Iterator[None]:
        """A part of the loop that may take as long as something moves, in this process or in one that this process waits for."""
        before = self._place
        self._patience += 1
        self._place = before._replace(phase=phase, patient=True)
        try:
            yield
        finally:
            self._patience -= 1
            self._place = self._place._replace(
                phase=before.phase, patient=before.patient
            )  # a new object: a mark

    def __enter__(self) -> "Watchdog":
        if self._size == 1:
            return self
        number = torch.tensor(
            [secrets.randbits(62)]
        )  # a restarted group can meet the keys of the group before it in the same store
        dist.broadcast(number, group_src=0, group=self._group)
        self._prefix = f"watchdog/{number.item()}"
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: calls of two threads on one wait for each other.
        timeout, others = timedelta(seconds=30), _connections(self._address[1])
        self._store = dist.TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timeout)
        opened = _connections(self._address[1]) - others
        self._connection = [
            socket.fromfd(file, socket.AF_INET, socket.SOCK_STREAM) for file in opened
        ]  # torch itself gives it to nobody
        self._main = threading.get_ident()
        self._publish()
        dist.barrier(self._group)  # from here on every process finds a beat of every other
        # No daemons: one that comes back from the store while the interpreter ends aborts the process.
        self._threads = [
            threading.Thread(target=run, name=run.__name__) for run in (self._converse, self._count_time)
        ]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left = "failed" if kind else "finished"
        self._leaving.set()
        if not self._threads:
            return
        self._threads[0].join(timeout=5)
        for (
            connection
        ) in self._connection:  # its calls end now, with an error, also where the store is the one that hangs
            with suppress(OSError):  # the store is gone
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join()

    def _count_time(self) -> None:
        """One thread: how long the loop has made no mark, how long the progress has stood still, and whether the other thread still gets
        answers."""
        place, still, idle, unanswered = self._place, 0.0, 0.0, 0.0
        progress: tuple[int, int] | None = None
        while not self._leaving.wait(self._interval):
            # Not by the clock, which goes on while the job is suspended.
            still = still + self._interval if self._place is place else 0.0
            place = self._place
            self._counted = place, still
            if self._progress is not None:
                before, progress = progress, self._progress()
                idle = idle + self._interval if progress == before else 0.0
                self._parts, self._idle = progress[0], idle
            unanswered = 0.0 if self._answered.is_set() else unanswered + self._interval
            self._answered.clear()
            if unanswered > self._silence(place.patient) and still >= self._limit and not self._stopping:
                host, port = self._address
                server = (
                    "torchrun on the first machine"
                    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
                    else "rank 0"
                )
                self._tell(
                    f"step {place.step}: rank {self._rank} (host {socket.gethostname()}, pid {os.getpid()}) has not gone on for "
                    f"{still:.0f} s, and the store of the processes at {host}:{port} does not answer: {server}, which serves it, "
                    f"is stopped, dead or cut off"
                )
                os._exit(EXIT_HUNG)

    def _converse(self) -> None:
        """The other thread: publish, see whether somebody has spoken the verdict, and look for the one who hangs when it is time."""
        try:
            while not self._leaving.wait(self._interval):
                self._publish()
                if self._store.check([f"{self._prefix}/verdict"]):
                    os._exit(EXIT_HUNG)
                if self._still(self._place) >= self._limit - self._silence(True) - self._interval:
                    self._look_around()
                self._answered.set()
            self._publish()
        except (
            dist.DistError
        ) as error:  # a lost connection alone stops nobody; the other thread sees that no more answers come
            if not self._leaving.is_set():
                os.write(
                    2,
                    f"\nwarning: the watchdog of rank {self._rank} has lost the store of the processes: {error}\n".encode(),
                )

    def _silence(self, patient: bool) -> float:
        """How many seconds without a sign of life are too many."""
        return max(_SILENT_BEATS * self._interval, _SILENT_SECONDS) * (_SILENT_IN_PATIENCE if patient else 1)

    def _still(self, place: Place) -> float:
        """For how many seconds `place` has been the last mark; 0 for one that nobody has counted yet."""
        counted, seconds = self._counted
        return seconds if counted is place else 0.0

    def _publish(self) -> None:
        place = self._place
        self._count += 1
        beat = Beat(
            rank=self._rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            count=self._count,
            **place._asdict(),
            still_seconds=self._still(place),
            where=line_of_code(self._main),
            left=self._left,  # type: ignore[arg-type]
            parts=self._parts,
            idle_seconds=self._idle,
        )
        self._store.set(f"{self._prefix}/{self._rank}", json.dumps(asdict(beat)))

    def _look_around(self) -> None:
        found = self._store.multi_get([f"{self._prefix}/{rank}" for rank in range(self._size)])
        beats = [Beat(**json.loads(beat)) for beat in found]
        self._unchanged = [
            unchanged + 1 if beat.count == count else 0
            for beat, count, unchanged in zip(beats, self._counts, self._unchanged, strict=True)
        ]
        self._counts = [beat.count for beat in beats]
        mute = {
            beat.rank
            for beat, unchanged in zip(beats, self._unchanged, strict=True)
            if unchanged * self._interval >= self._silence(beat.patient)
        }
        blame = find_blame(beats, mute, self._limit) if self._still(self._place) >= self._limit else None
        self._looks = self._looks + 1 if blame and blame == self._blame else 1
        self._blame = blame
        if blame and self._looks == _LOOKS:
            self._stop(describe(blame, beats))

    def _stop(self, message: str) -> None:
        """End all processes; the first that comes here speaks for all, and leaves last: else its end would break the others' collectives,
        with a traceback each, and torchrun would end them in the middle of a word."""
        try:
            first = self._store.add(f"{self._prefix}/speakers", 1) == 1
            self._stopping = True
            if first:
                self._tell(message)
                self._store.set(f"{self._prefix}/verdict", message)
                time.sleep(2 * self._interval)
            else:
                self._store.wait([f"{self._prefix}/verdict"], timedelta(seconds=self._tell_seconds))
        finally:
            os._exit(EXIT_HUNG)

    def _tell(self, message: str) -> None:
        """Print and call `on_stop`. What hangs may be the very disk or terminal that they write to, so they are not waited for for ever."""
        line = f"\nerror: {message}. Stopping all processes; go on with --resume-from-checkpoint auto\n"

        def tell() -> None:
            os.write(2, line.encode())  # past sys.stderr: the loop may hang with its lock
            self._on_stop(message)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(timeout=self._tell_seconds)


def _connections(port: int) -> set[int]:
    """The open files of this process that are connections to a port, anywhere."""
    found = set()
    for name in os.listdir("/dev/fd"):
        with suppress(OSError), socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as connection:
            if connection.getpeername()[1:2] == (port,):
                found.add(int(name))
    return found


def line_of_code(main: int) -> str:
    """Where the thread `main` stands: its innermost line that is not a library's, the innermost of all behind it, and the lines where
    other threads are at work for it, if any (the loader of batches, say)."""
    frames = sys._current_frames()
    innermost = frames.pop(main)
    # This very frame would hold itself, and with it all that the loop has in its variables, until the next garbage collection.
    frames.pop(threading.get_ident(), None)
    while innermost.f_code.co_filename == __file__ and innermost.f_back:
        innermost = innermost.f_back
    own, last = _own_line(innermost), _line(innermost)
    threads = sorted({line for frame in frames.values() if (line := _own_line(frame))})
    return (last if own in (None, last) else f"{own} > {last}") + "".join(
        f", thread in {line}" for line in threads
    )


def _own_line(frame: FrameType | None) -> str | None:
    """The innermost line that is neither a library's nor the watchdog's."""
    while frame is not None:
        path = frame.f_code.co_filename
        if path != __file__ and (path.startswith(_LUMI) or not path.startswith((*_FOREIGN, "<"))):
            return _line(frame)
        frame = frame.f_back
    return None


def _line(frame: FrameType) -> str:
    return f"{os.path.basename(frame.f_code.co_filename)}:{frame.f_lineno} {frame.f_code.co_qualname}"
