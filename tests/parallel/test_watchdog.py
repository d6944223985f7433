"""Real hangs of real processes; `watchdog_processes.py` is what runs in them.

tests/training/test_faults.py hangs whole trainings: a process that sleeps, a slow save and a save that hangs.
Those three are repeated here for the watchdog alone, in the soak.
"""

import contextlib
import re
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import watchdog_processes
from case_server import DEADLINE_SECONDS, Case
from runs import ENVIRONMENT

from lumi.checkpoint.saver import Saver
from lumi.host.tensor_files import load_tensors
from lumi.parallel.watchdog import EXIT_HUNG, Watchdog

HOST = socket.gethostname()
SCRIPT = Path(watchdog_processes.__file__)
linux = pytest.mark.skipif(sys.platform != "linux", reason="forks, and finds processes in /proc")


def line_number(text, after=0):
    """Where `watchdog_processes.py` has a line."""
    return SCRIPT.read_text().splitlines().index(text) + 1 + after


def stopped(pid):
    """Whether the state of a process in /proc is T."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    return False


def error_line(errors):
    """The one line of the watchdog."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    return lines[0]


class Group:
    """Processes of which one hangs."""

    def __init__(self, folder, fault, store, size):
        self.folder, self.size = folder, size
        self.case = Case("watchdog_processes", fault, store, size, folder, log=folder / "log")

    def end(self):
        """Wait until every process has ended or is stopped. Returns exit codes by rank, and the log."""
        deadline = time.monotonic() + DEADLINE_SECONDS
        while self.case.poll() is None and time.monotonic() < deadline:
            if len(self.codes()) + sum(map(stopped, self.pids())) == self.size:
                break
            time.sleep(0.1)
        return self.codes(), self.case.log

    def codes(self):
        files = [path for path in self.folder.glob("code-*") if path.read_text()]
        return {int(path.name.removeprefix("code-")): int(path.read_text()) for path in files}

    def pids(self):
        """Of the processes, by rank."""
        file = self.folder / "pids"
        return [int(pid) for pid in file.read_text().split()] if file.exists() else []


@pytest.fixture(scope="module")
def groups(request, tmp_path_factory):
    """The groups of all selected tests, begun before the first of them: most of the time they wait."""
    begun = {}
    for item in request.session.items:
        if item.path == request.path and "group" in getattr(item, "fixturenames", ()):
            case = item.callspec.params["group"]
            begun[case] = Group(tmp_path_factory.mktemp("group"), *case)
    yield begun
    for group in begun.values():
        group.case.kill()


@pytest.fixture
def group(request, groups):
    return groups[request.param]


def of(fault, store, size):
    """Parametrize a test with one group: the fault, who serves the store, the number of processes."""
    return pytest.mark.parametrize("group", [pytest.param((fault, store, size), marks=linux)], indirect=True)


@of("stop rank 0", "another", 3)
def test_a_stopped_process_is_named_and_all_end(group):
    codes, errors = group.end()
    line = error_line(errors)
    # The others come to step 4 if rank 0 had sent its share of step 3 before it was stopped.
    said = f"rank 0 (host {HOST}, pid {group.pids()[0]}) gives no sign of life"
    assert line.startswith((f"error: step 3: {said}", f"error: step 4: {said}"))
    assert re.search(r"last seen: it stands at step \d, .*, in \w+\.py:\d+ ", line)
    assert codes == {1: EXIT_HUNG, 2: EXIT_HUNG}
    assert len((group.folder / "stopped").read_text().splitlines()) == 1


@of("stop rank 0", "rank 0", 2)
def test_a_store_that_does_not_answer(group):
    """Without torchrun rank 0 serves the store. When it is stopped, the calls of the others never return."""
    codes, errors = group.end()
    line, port = error_line(errors), (group.folder / "port").read_text()
    assert f"rank 1 (host {HOST}, pid {group.pids()[1]}) has not gone on for" in line
    dead = f"127.0.0.1:{port} does not answer: rank 0, which serves it, is stopped, dead or cut off"
    assert dead in line
    assert codes == {1: EXIT_HUNG}


@pytest.mark.soak  # a hung save of test_faults.py goes the same way
@of("stop in save", "another", 2)
def test_a_process_that_stops_in_a_save_is_named(group):
    """Even while the save of another process moves."""
    codes, errors = group.end()
    assert f"rank 1 (host {HOST}, pid {group.pids()[1]}) gives no sign of life" in error_line(errors)
    assert codes == {0: EXIT_HUNG}


@of("stop store", "another", 2)
def test_a_store_that_stops_before_the_end_and_goes_on_while_the_interpreter_ends(group):
    """The processes end as they would without it: at once, and with their own exit code."""
    codes, errors = group.end()
    assert codes == {0: 7, 1: 7}, errors
    assert "terminate called" not in errors


@pytest.mark.soak
@of("hung save", "another", 2)
def test_a_save_that_hangs_is_named(group):
    """Both loops wait for the save before, with patience; the save of rank 0 does not go on."""
    codes, errors = group.end()
    line, hang = error_line(errors), line_number("def hang(path):", after=1)
    assert f"rank 0 (host {HOST}, pid {group.pids()[0]}) has written nothing for " in line
    assert "and all wait for it: it stands at step 2, saving, in " in line
    assert f"thread in {SCRIPT.name}:{hang} hang" in line
    assert codes == {0: EXIT_HUNG, 1: EXIT_HUNG}


@pytest.mark.soak
@of("slow save", "another", 3)
def test_a_slow_save_stops_nobody(group):
    codes, errors = group.end()
    assert codes == {0: 0, 1: 0, 2: 0}, errors
    assert "error: " not in errors
    assert len(list(group.folder.glob("done-*"))) == 3


@pytest.mark.soak
@linux
def test_a_process_that_sleeps_is_named_and_torchrun_ends(tmp_path):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3"]
    command = [sys.executable, *launcher, str(SCRIPT), "sleep", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    line, sleeping = error_line(done.stderr), line_number("        time.sleep(1000)")
    pid = (tmp_path / "pid-1").read_text()
    assert line.startswith(f"error: step 3: rank 1 (host {HOST}, pid {pid}) has not gone on for ")
    assert f"it stands at step 3, waiting for data, in {SCRIPT.name}:{sleeping} load" in line
    waits = r"the others wait for it, rank [02] at step 3, counting targets, in \w+\.py:\d+ work > "
    assert re.search(waits, line)
    assert "--resume-from-checkpoint auto" in line
    assert done.returncode == 1
    assert f"exitcode  : {EXIT_HUNG}" in done.stderr  # torchrun's own summary
    assert "[rank" not in done.stderr  # no traceback: all have left before anybody met a broken connection
    stopped = (tmp_path / "stopped").read_text()
    assert stopped.count("\n") == 1
    assert stopped.split(maxsplit=1)[1].strip() in line


def test_progress_of_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr("lumi.host.tensor_files._CHUNK_BYTES", 1000)
    seen = []
    with Saver(tmp_path) as saver:
        before = saver.progress
        tensors = {"model": {"a": torch.zeros(875), "b": torch.zeros(3), "c": torch.zeros(0)}}
        saver.begin(1, tensors, {}, finish=lambda path: seen.append(saver.progress))
        saver.wait()
        after = saver.progress
    # Parts: the folder, the tensors of 3500 and 12 bytes, the seal; then what follows.
    assert (before, seen, after) == ((0, 0), [(3, 5)], (4, 5))
    saved = load_tensors(tmp_path / "step-00000001" / "model-00000.safetensors")
    assert torch.equal(saved["a"], tensors["model"]["a"])


def test_one_process_is_not_watched():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        before = threading.active_count()
        with Watchdog(dist.group.WORLD, 1e-3, pytest.fail) as watchdog:
            watchdog.mark(1, "waiting for data")
            with watchdog.patience("saving"):
                time.sleep(0.05)
            assert threading.active_count() == before
    finally:
        dist.destroy_process_group()
