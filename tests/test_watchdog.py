"""Real hangs of real processes, under torchrun and without."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from lumi.watchdog import EXIT_HUNG, Watchdog, line_of_code

# Argument 1: what goes wrong at step 3; argument 2: the limit in seconds; argument 3: a folder for what the processes leave.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
from lumi.watchdog import Watchdog

fault, limit, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
(folder / f"pid-{rank}").write_text(str(os.getpid()))

def load(step):
    if (fault, step, rank) == ("sleep", 3, 1):
        time.sleep(1000)
    if (fault, step, rank) == ("stop rank 0", 3, dist.get_world_size() - 1):
        os.kill(int((folder / "pid-0").read_text()), signal.SIGSTOP)

def save(seconds):
    if rank == 0:
        time.sleep(seconds)
    dist.barrier()

def on_stop(message):
    time.sleep(2)  # a slow disk
    with open(folder / "stopped", "a") as file:
        file.write(f"{rank} {message}\\n")

with Watchdog(dist.group.WORLD, limit, on_stop) as watchdog:
    for step in range(1, 5):
        watchdog.mark(step, "waiting for data")
        load(step)
        watchdog.mark(step, "counting targets")
        dist.all_reduce(torch.ones(1))
        if fault == "slow save" and step == 3:
            if rank == 2:  # waits without patience of its own
                save(2.5 * limit)
            else:
                with watchdog.patience("saving"):
                    save(2.5 * limit)
dist.destroy_process_group()
(folder / f"done-{rank}").touch()
"""


@pytest.fixture
def script(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(SCRIPT)
    return path


def environment(**more):
    return os.environ | {"OMP_NUM_THREADS": "1"} | more


def launch(script, *arguments):
    """Under torchrun, 3 processes; returns its exit code and stderr. The processes it started are gone when it ends, or the test fails."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=3", script, *arguments, script.parent]
    log, deadline = script.parent / "stderr", time.monotonic() + 120
    with log.open("w") as file:
        torchrun = subprocess.Popen([str(part) for part in command], env=environment(), stderr=file)
    try:
        while torchrun.poll() is None:
            assert time.monotonic() < deadline, log.read_text()
            left = [pid for pid in pids(script.parent) if alive(pid)]
            if len(left) == 1 and stopped(left[0]):
                os.kill(left[0], signal.SIGKILL)  # as torchrun does, which waits 30 s before
            time.sleep(0.1)
        assert not [pid for pid in pids(script.parent) if alive(pid)]
    finally:
        torchrun.kill()
        torchrun.wait()
        for pid in pids(script.parent):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    return torchrun.returncode, log.read_text()


def pids(folder):
    return [int(pid) for path in sorted(folder.glob("pid-*")) if (pid := path.read_text())]


def state(pid):
    """The letter of /proc: T stopped, Z dead and not yet waited for; nothing for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def alive(pid):
    return state(pid) not in ("", "Z")


def stopped(pid):
    return state(pid) == "T"


def error_line(errors):
    """The one line of the watchdog."""
    lines = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, errors
    return lines[0]


def test_a_process_that_sleeps_is_named_and_all_end(script):
    code, errors = launch(script, "sleep", "3")
    line, host = error_line(errors), socket.gethostname()
    sleeping = SCRIPT.splitlines().index("        time.sleep(1000)") + 1
    assert line.startswith(f"error: step 3: rank 1 (host {host}, pid {pids(script.parent)[1]}) has not gone on for ")
    assert f"it stands at step 3, waiting for data, in script.py:{sleeping} load" in line
    assert re.search(r"the others wait for it, rank [02] at step 3, counting targets, in script.py:\d+ <module> > ", line)
    assert "--resume-from-checkpoint auto" in line
    assert code == 1
    assert f"exitcode  : {EXIT_HUNG}" in errors  # torchrun's own summary
    assert "[rank" not in errors  # no traceback: all have left before anybody met a broken connection
    stopped = (script.parent / "stopped").read_text()
    assert stopped.count("\n") == 1
    assert stopped.split(maxsplit=1)[1].strip() in line


def test_a_stopped_process_is_named_and_all_end(script):
    code, errors = launch(script, "stop rank 0", "3")
    line = error_line(errors)
    assert line.startswith(f"error: step 3: rank 0 (host {socket.gethostname()}, pid {pids(script.parent)[0]}) gives no sign of life")
    assert re.search(r"last seen: it stands at step \d, .*, in script.py:\d+ ", line)
    assert code == 1
    assert len((script.parent / "stopped").read_text().splitlines()) == 1


def test_a_slow_save_stops_nobody(script):
    code, errors = launch(script, "slow save", "4")
    assert code == 0, errors
    assert "error: " not in errors
    assert len(list(script.parent.glob("done-*"))) == 3


def test_a_store_that_does_not_answer(script):
    """Without torchrun rank 0 serves the store: when it is stopped, the calls of the others come back never."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables = environment(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE="2")
    command = [sys.executable, script, "stop rank 0", "3", script.parent]
    ranks = [subprocess.Popen(command, env=variables | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True) for rank in range(2)]
    try:
        _, errors = ranks[1].communicate(timeout=120)
    finally:
        for process in ranks:
            process.kill()
            process.communicate()
    line = error_line(errors)
    assert f"rank 1 (host {socket.gethostname()}, pid {ranks[1].pid}) has not gone on for" in line
    assert f"127.0.0.1:{port} does not answer: rank 0, which serves it, is stopped, dead or cut off" in line
    assert ranks[1].returncode == EXIT_HUNG


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


def test_the_line_of_code_names_our_code_the_innermost_call_and_other_threads():
    free, inside = threading.Event(), threading.Event()

    def loads():
        inside.set()
        free.wait(60)

    reader, lines = threading.get_ident(), []
    thread = threading.Thread(target=loads)
    thread.start()
    watcher = threading.Thread(target=lambda: (inside.wait(60), time.sleep(0.2), lines.append(line_of_code(reader)), free.set()))
    watcher.start()
    free.wait(60)
    thread.join()
    watcher.join()
    name = "test_the_line_of_code_names_our_code_the_innermost_call_and_other_threads"
    assert re.match(rf"test_watchdog\.py:\d+ {name} > threading\.py:\d+ Condition\.wait, thread in ", lines[0])
    assert re.search(rf"test_watchdog\.py:\d+ {name}\.<locals>\.loads\b", lines[0])
