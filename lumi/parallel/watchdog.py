"""Stops a run that hangs, and names what it hangs on.

A process whose loop has stopped (a dead disk, a lost machine, a deadlock) makes all others wait silently in
the next collective. So every process publishes where its loop stands, in the store of its process group. A
process that has waited too long looks for the one that is behind, prints one line about it, and ends all
processes.
"""

import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import timedelta
from typing import NamedTuple

import torch
import torch.distributed as dist

from lumi.parallel.blame import Beat, Blame, describe, find_blame
from lumi.parallel.line_of_code import line_of_code

EXIT_HUNG = 75  # sysexits.h: EX_TEMPFAIL, a failure that another try may mend
# A process no longer runs if its beat has not changed during so many of ours, and for so long.
_SILENT_BEATS, _SILENT_SECONDS = 5, 10.0
_SILENT_IN_PATIENCE = 3  # times as long: a save can starve a machine
_LOOKS = 3  # in a row with one result: beats are as old as their interval, and all may go on in this moment


class Place(NamedTuple):
    """Where a loop stands: at the `mark`-th mark of a step. `patient`: what it does now may take long."""

    step: int
    mark: int
    phase: str
    patient: bool


class Watchdog:
    """Ends the processes of `group` when one hangs.

    It is a `with` block around the loop, which calls `mark(step, phase)` where it goes on. All processes must
    make the same marks in the same order. A process that has made no mark for `limit_seconds` looks at the
    others. A part of the loop under `patience` may take longer, as long as the `progress` of any process
    advances. Time in which this process itself did not run (a suspended job) does not count. One process has
    nobody to wait for, and is not watched.

    Two threads live within the block. One talks to the store. The other counts the time, and sees whether the
    first one
    still gets answers: a store on a stopped machine never answers, and no time-out ends the call.

    Args:
        group: all processes, on gloo; `with` waits until all have joined.
        limit_seconds: the longest that a mark may take, and that `progress` may stand still. The run ends at
            most a tenth of it and 40 s later.
        on_stop: called with the message by the process that prints it, in another thread than the loop's.
            It has at most `max(5, limit_seconds / 10)` seconds.
        progress: of the work behind this process's loop: how much of the common work it has done, and a
            number that changes while anything advances. Called from another thread than the loop's. None:
            this is unknown, and patience has no end.
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
        self._parts, self._idle = 0, 0.0  # the progress, and for how many seconds it has stood still
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
        mark = self._place.mark + 1 if step == self._place.step else 0
        self._place = Place(step, mark, phase, self._patience > 0)

    @contextmanager
    def patience(self, phase: str) -> Iterator[None]:
        """A part of the loop that may take long, while anything advances in a process that is waited for."""
        before = self._place
        self._patience += 1
        self._place = before._replace(phase=phase, patient=True)
        try:
            yield
        finally:
            self._patience -= 1
            # A new object is a new mark.
            self._place = self._place._replace(phase=before.phase, patient=before.patient)

    def __enter__(self) -> "Watchdog":
        if self._size == 1:
            return self
        # A restarted group can meet keys of the earlier group in the store: a random prefix keeps them apart.
        number = torch.tensor([secrets.randbits(62)])
        dist.broadcast(number, group_src=0, group=self._group)
        self._prefix = f"watchdog/{number.item()}"
        self._address = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        # A connection of its own: on a shared one, calls of two threads wait for each other.
        timeout, others = timedelta(seconds=30), _connections(self._address[1])
        self._store = dist.TCPStore(*self._address, is_master=False, wait_for_workers=False, timeout=timeout)
        opened = _connections(self._address[1]) - others  # torch does not tell which one it is
        self._connection = [socket.fromfd(file, socket.AF_INET, socket.SOCK_STREAM) for file in opened]
        self._main = threading.get_ident()
        self._publish()
        dist.barrier(self._group)  # from here on every process finds a beat of every other
        # No daemons: a daemon that returns from the store while the interpreter ends aborts the process.
        targets = self._converse, self._count_time
        self._threads = [threading.Thread(target=target, name=target.__name__) for target in targets]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._left = "failed" if kind else "finished"
        self._leaving.set()
        if not self._threads:
            return
        self._threads[0].join(timeout=5)
        for connection in self._connection:  # its calls end now with an error, even if the store itself hangs
            with suppress(OSError):  # the store is gone
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join()

    def _count_time(self) -> None:
        """One thread: count the time since the last mark, the last progress and the store's last answer."""
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
                self._tell(self._describe_dead_store(place.step, still))
                os._exit(EXIT_HUNG)

    def _describe_dead_store(self, step: int, still: float) -> str:
        host, port = self._address
        by_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        server = "torchrun on the first machine" if by_torchrun else "rank 0"
        who = f"rank {self._rank} (host {socket.gethostname()}, pid {os.getpid()})"
        return (
            f"step {step}: {who} has not gone on for {still:.0f} s, and the store of the processes at "
            f"{host}:{port} does not answer: {server}, which serves it, is stopped, dead or cut off"
        )

    def _converse(self) -> None:
        """The other thread: publish beats, end when the others do, and look for who hangs when it is time."""
        try:
            while not self._leaving.wait(self._interval):
                self._publish()
                if self._store.check([f"{self._prefix}/verdict"]):
                    os._exit(EXIT_HUNG)
                if self._still(self._place) >= self._limit - self._silence(True) - self._interval:
                    self._look_around()
                self._answered.set()
            self._publish()
        except dist.DistError as error:  # it stops nobody; the other thread sees that no more answers come
            if not self._leaving.is_set():
                lost = f"the watchdog of rank {self._rank} has lost the store of the processes"
                os.write(2, f"\nwarning: {lost}: {error}\n".encode())

    def _silence(self, patient: bool) -> float:
        """How many seconds without a sign of life are too many."""
        seconds = max(_SILENT_BEATS * self._interval, _SILENT_SECONDS)
        return seconds * _SILENT_IN_PATIENCE if patient else seconds

    def _still(self, place: Place) -> float:
        """For how many seconds `place` has been the last mark; 0 if it was not counted yet."""
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
        """End all processes. The first that comes here prints the message, and leaves last.

        If it left first, its end would break the collectives of the others with a traceback each, and
        torchrun would kill them while they print.
        """
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
        """Print and call `on_stop`, with a time limit: the disk or terminal that they write to may hang."""
        line = f"\nerror: {message}. Stopping all processes; go on with --resume-from-checkpoint auto\n"

        def tell() -> None:
            os.write(2, line.encode())  # past sys.stderr: the loop may hang with its lock
            self._on_stop(message)

        thread = threading.Thread(target=tell, daemon=True)
        thread.start()
        thread.join(timeout=self._tell_seconds)


def _connections(port: int) -> set[int]:
    """The open files of this process that are connections to a port. Empty on Windows, which cannot tell."""
    found: set[int] = set()
    if not os.path.isdir("/dev/fd"):
        return found
    for name in os.listdir("/dev/fd"):
        with suppress(OSError), socket.fromfd(int(name), socket.AF_INET, socket.SOCK_STREAM) as connection:
            if connection.getpeername()[1:2] == (port,):
                found.add(int(name))
    return found
