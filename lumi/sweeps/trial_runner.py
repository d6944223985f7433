"""Trials side by side: as many processes as asked for, ended when they have come far enough."""

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess

import torch

from lumi.host.interruption import StopSignal
from lumi.host.workers import num_cores
from lumi.sweeps.trial import Trial
from lumi.sweeps.trial_process import begin
from lumi.training.run_status import write_status

POLL_SECONDS = 0.5


@dataclass
class _Running:
    """A trial at work. `slot`: which of the processes it is; `stopping`: it has been told to end."""

    trial: Trial
    process: BaseProcess
    slot: int
    stopping: bool = False


@dataclass
class TrialRunner:
    """Runs trials, `num_processes` at a time.

    Attributes:
        arguments: the training's command line, without what is a trial's own.
        stop: a signal ends the work.
        deadline: when it ends by itself, by `time.monotonic`; None: never.
        report: hears of each trial that begins or ends.
    """

    arguments: Sequence[str]
    num_processes: int
    device: str
    stop: StopSignal
    deadline: float | None
    report: Callable[[Trial, str], None]
    _running: list[_Running] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether a signal came, or the time is up."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return late or self.stop.received > 0

    def run(self, trials: Iterable[Trial], until: int | None) -> None:
        """Train until all of them are finished or failed, or have been validated at step `until`.

        A trial that is not finished by then has a checkpoint, and can go on. Processes end with this call,
        also if an exception does it.
        """
        waiting = [trial for trial in trials if not reached(trial, until)]
        try:
            while (waiting or self._running) and not self.is_over:
                while waiting and len(self._running) < self.num_processes:
                    self._begin(waiting.pop(0))
                wait([running.process.sentinel for running in self._running], timeout=POLL_SECONDS)
                for running in list(self._running):
                    if running.process.exitcode is not None:
                        self._end(running)
                    elif until is not None and reached(running.trial, until):
                        self._ask_to_stop(running)
        finally:
            for running in self._running:
                self._ask_to_stop(running)
            for running in list(self._running):
                running.process.join()
                self._end(running)

    def _begin(self, trial: Trial) -> None:
        used = {running.slot for running in self._running}
        slot = next(slot for slot in range(self.num_processes) if slot not in used)
        own = ["--output-dir", str(trial.folder), "--resume-from-checkpoint", "auto"]
        changes = [*trial.setting.overrides, f"seed={trial.seed}"]
        process = begin(
            [*self.arguments, *own, *changes],
            trial.log,
            environment_of(slot, self.num_processes, self.device),
        )
        self._running.append(_Running(trial, process, slot))
        self.report(trial, "begun")

    def _ask_to_stop(self, running: _Running) -> None:
        """Once: a second signal would end the run before it has saved."""
        if not running.stopping:
            running.stopping = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(running.process.pid or 0, signal.SIGTERM)

    def _end(self, running: _Running) -> None:
        """Take in a process that has ended. A trial that says nothing of its end gets a status here."""
        self._running.remove(running)
        trial, code = running.trial, running.process.exitcode
        progress = trial.progress()
        if code and not running.stopping and progress.status != "failed":
            write_status(trial.folder, "failed", progress.step, message=_last_words(trial, code))
            progress = trial.progress()
        running.process.close()
        if progress.status == "failed":
            self.report(trial, f"failed: {progress.message}")
        elif progress.result is not None:
            self.report(trial, f"finished: {progress.result:.4f} bits per byte")
        elif progress.step:
            self.report(trial, f"saved at step {progress.step}")
        else:
            self.report(trial, "not begun: stopped before step 1")


def reached(trial: Trial, until: int | None) -> bool:
    """Whether a trial is finished or failed, or has been validated at a step."""
    progress = trial.progress()
    return progress.status in ("finished", "failed") or (until is not None and until in progress.validations)


def environment_of(slot: int, num_processes: int, device: str) -> Mapping[str, str]:
    """What a process gets of the machine: on a GPU one of them, on a CPU its share of the cores."""
    if device == "cuda":
        named = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        devices = named.split(",") if named else [str(index) for index in range(torch.cuda.device_count())]
        return {"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]}
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, num_cores() // num_processes))}


def _last_words(trial: Trial, code: int) -> str:
    """Why a process ended, from what it printed last or from its exit code."""
    lines = (
        trial.log.read_text(encoding="utf-8", errors="replace").splitlines() if trial.log.is_file() else []
    )
    said = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    if said:
        return said.removeprefix("error: ")
    why = f"it was ended by {signal.Signals(-code).name}" if code < 0 else f"it ended with exit code {code}"
    return f"{why}; see {trial.log}"
