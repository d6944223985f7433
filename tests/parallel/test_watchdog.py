"""Real hangs of real processes, under torchrun and without."""

import contextlib
import gc
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lumi.checkpoint.saver import Saver
from lumi.host.tensor_files import load_tensors
from lumi.parallel.watchdog import EXIT_HUNG, Watchdog, line_of_code

# Argument 1: what goes wrong; argument 2: the limit in seconds; argument 3: a folder for what the processes leave. Without torchrun it
# forks into two processes, and into a third one where a store of their own is to be stopped.
SCRIPT = """
import os, signal, sys, time
from pathlib import Path
import torch
import torch.distributed as dist
import lumi.checkpoint.checkpoint
from lumi.checkpoint.saver import Saver
from lumi.parallel.watchdog import Watchdog

fault, limit, folder = sys.argv[1], float(sys.argv[2]), Path(sys.argv[3])

def serve():
    store = dist.TCPStore("127.0.0.1", int(os.environ["MASTER_PORT"]), is_master=True, wait_for_workers=False)
    while True:
        signal.pause()

def fork():
    own_store = fault == "stop store"
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = str(own_store)
    if own_store:
        server = os.fork()
        if not server:
            serve()
        (folder / "server").write_text(str(server))
    ranks = []
    for rank in range(2):
        process = os.fork()
        if not process:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
            return
        ranks.append(process)
    (folder / "pids").write_text(" ".join(map(str, ranks)))
    for rank in range(2):
        process, status = os.wait()
        (folder / f"code-{ranks.index(process)}").write_text(str(os.waitstatus_to_exitcode(status)))
    os._exit(0)

if "RANK" not in os.environ:
    fork()
dist.init_process_group("gloo")
rank, saving = dist.get_rank(), dist.new_group()
(folder / f"pid-{rank}").write_text(str(os.getpid()))
saver = Saver(folder / "checkpoints", rank, dist.get_world_size(), saving)

def load(step):
    if (fault, step, rank) == ("sleep", 3, 1):
        time.sleep(1000)
    if (fault, step, rank) == ("stop rank 0", 3, dist.get_world_size() - 1):
        os.kill(int((folder / "pid-0").read_text()), signal.SIGSTOP)

def on_stop(message):
    time.sleep(2)  # a slow disk
    with open(folder / "stopped", "a") as file:
        file.write(f"{rank} {message}\\n")

def hang(path):
    time.sleep(1000)

def save_slowly():
    real, lumi.host.tensor_files._CHUNK_BYTES = os.fsync, 1
    def fsync(file):
        if rank == 0 and sys._getframe(1).f_code.co_name == "save_tensors":
            time.sleep(limit / 3)
        real(file)
    os.fsync = fsync
    saver.begin(3, {"model": {"a": torch.ones(2)}}, {})  # rank 0 writes it, a byte at a time
    start = time.monotonic()
    if rank == 2:  # waits without patience of its own
        dist.barrier()
    else:
        with watchdog.patience("saving"):
            saver.wait()
            assert rank or time.monotonic() - start > 2 * limit
        dist.barrier()

with Watchdog(dist.group.WORLD, limit, on_stop, lambda: (0, time.monotonic()) if fault == "stop in save" else saver.progress) as watchdog:
    for step in range(1, 5):
        watchdog.mark(step, "waiting for data")
        load(step)
        watchdog.mark(step, "counting targets")
        dist.all_reduce(torch.ones(1))
        if fault == "slow save" and step == 3:
            save_slowly()
        if fault == "hung save":
            with watchdog.patience("saving"):
                saver.begin(step, {"model": {"a": torch.ones(3)}}, {}, hang)
        if fault == "stop in save" and step == 3:
            with watchdog.patience("saving"):
                time.sleep(limit)
                if rank == 1:
                    os.kill(os.getpid(), signal.SIGSTOP)
                dist.barrier()
    if fault == "stop store":
        server = int((folder / "server").read_text())
        dist.barrier()
        os.kill(server, signal.SIGSTOP)
        time.sleep(1)
saver.close()
dist.destroy_process_group()
(folder / f"done-{rank}").touch()
if fault == "stop store":
    class GoesOn:
        def __del__(self):  # while the interpreter ends
            os.kill(server, signal.SIGCONT)
            time.sleep(1)
    sys.modules["goes_on"] = GoesOn()
    sys.exit(7)
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
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        script,
        *arguments,
        script.parent,
    ]
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
    assert line.startswith(
        f"error: step 3: rank 1 (host {host}, pid {pids(script.parent)[1]}) has not gone on for "
    )
    assert f"it stands at step 3, waiting for data, in script.py:{sleeping} load" in line
    assert re.search(
        r"the others wait for it, rank [02] at step 3, counting targets, in script.py:\d+ <module> > ", line
    )
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
    assert line.startswith(
        f"error: step 3: rank 0 (host {socket.gethostname()}, pid {pids(script.parent)[0]}) gives no sign of life"
    )
    assert re.search(r"last seen: it stands at step \d, .*, in script.py:\d+ ", line)
    assert code == 1
    assert len((script.parent / "stopped").read_text().splitlines()) == 1


def test_a_slow_save_stops_nobody(script):
    code, errors = launch(script, "slow save", "3")
    assert code == 0, errors
    assert "error: " not in errors
    assert len(list(script.parent.glob("done-*"))) == 3


class Pair:
    """Two processes without torchrun, of one import. Rank 0 serves the store, but in "stop store"."""

    def __init__(self, fault, folder):
        self.folder = folder
        folder.mkdir()
        path = folder / "script.py"
        path.write_text(SCRIPT)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with (folder / "stderr").open("w") as file:
            command = [sys.executable, path, fault, "3", folder]
            self.parent = subprocess.Popen(command, env=environment(MASTER_PORT=str(self.port)), stderr=file)

    def end(self):
        """Wait until all that can have ended. Returns the exit codes by rank, and what they said."""
        deadline = time.monotonic() + 120
        while self.parent.poll() is None and time.monotonic() < deadline:
            codes = list(self.folder.glob("code-*"))
            if len(codes) == 1 and any(map(stopped, self.pids())):
                break
            time.sleep(0.1)
        codes = {int(path.name[-1]): int(path.read_text()) for path in self.folder.glob("code-*")}
        return codes, (self.folder / "stderr").read_text()

    def pids(self):
        return [
            int(pid)
            for name in ("pids", "server")
            if (self.folder / name).exists()
            for pid in (self.folder / name).read_text().split()
        ]

    def kill(self):
        for pid in (*self.pids(), self.parent.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.parent.wait()


@pytest.fixture(scope="module", autouse=True)
def pairs(tmp_path_factory):
    """All pairs by what goes wrong, begun before the first test: most of the time they wait."""
    faults = ("stop rank 0", "hung save", "stop in save", "stop store")
    folder = tmp_path_factory.mktemp("pairs")
    begun = {fault: Pair(fault, folder / fault) for fault in faults}
    yield begun
    for pair in begun.values():
        pair.kill()


def test_a_store_that_does_not_answer(pairs):
    """Without torchrun rank 0 serves the store: when it is stopped, the calls of the others come back never."""
    pair = pairs["stop rank 0"]
    codes, errors = pair.end()
    line = error_line(errors)
    assert f"rank 1 (host {socket.gethostname()}, pid {pair.pids()[1]}) has not gone on for" in line
    assert (
        f"127.0.0.1:{pair.port} does not answer: rank 0, which serves it, is stopped, dead or cut off" in line
    )
    assert codes == {1: EXIT_HUNG}


def test_a_save_that_hangs_is_named(pairs):
    """Both loops wait for the save before, with patience; behind that of rank 0 it does not go on."""
    pair = pairs["hung save"]
    codes, errors = pair.end()
    line, hang = error_line(errors), SCRIPT.splitlines().index("def hang(path):") + 2
    assert f"rank 0 (host {socket.gethostname()}, pid {pair.pids()[0]}) has written nothing for " in line
    assert "and all wait for it: it stands at step 2, saving, in " in line
    assert f"thread in script.py:{hang} hang" in line
    assert codes == {0: EXIT_HUNG, 1: EXIT_HUNG}


def test_a_process_that_stops_in_a_save_is_named(pairs):
    """Even as the save of another one moves."""
    pair = pairs["stop in save"]
    codes, errors = pair.end()
    assert f"rank 1 (host {socket.gethostname()}, pid {pair.pids()[1]}) gives no sign of life" in error_line(
        errors
    )
    assert codes == {0: EXIT_HUNG}


def test_a_store_that_stops_before_the_end_and_goes_on_while_the_interpreter_ends(pairs):
    """The processes end as they would: at once, and with their own exit code."""
    codes, errors = pairs["stop store"].end()
    assert codes == {0: 7, 1: 7}, errors
    assert "terminate called" not in errors


def test_progress_of_a_save(tmp_path, monkeypatch):
    monkeypatch.setattr("lumi.host.tensor_files._CHUNK_BYTES", 1000)
    seen = []
    with Saver(tmp_path) as saver:
        before = saver.progress
        tensors = {"model": {"a": torch.zeros(875), "b": torch.zeros(3), "c": torch.zeros(0)}}
        saver.begin(1, tensors, {}, finish=lambda path: seen.append(saver.progress))
        saver.wait()
        after = saver.progress
    assert (before, seen, after) == (
        (0, 0),
        [(3, 5)],
        (4, 5),
    )  # the folder, the tensors of 3500 and 12 bytes, the seal; what follows
    assert torch.equal(
        load_tensors(tmp_path / "step-00000001" / "model-00000.safetensors")["a"], tensors["model"]["a"]
    )


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
    watcher = threading.Thread(
        target=lambda: (inside.wait(60), time.sleep(0.2), lines.append(line_of_code(reader)), free.set())
    )
    watcher.start()
    free.wait(60)
    thread.join()
    watcher.join()
    name = "test_the_line_of_code_names_our_code_the_innermost_call_and_other_threads"
    assert re.match(
        rf"test_watchdog\.py:\d+ {name} > threading\.py:\d+ Condition\.wait, thread in ", lines[0]
    )
    assert re.search(rf"test_watchdog\.py:\d+ {name}\.<locals>\.loads\b", lines[0])


def test_the_line_of_code_keeps_nothing_alive():
    """The variables of the loop go when the loop lets them go, not at the next garbage collection."""

    class Logits:
        pass

    def step():
        logits = Logits()
        watcher = threading.Thread(target=line_of_code, args=(threading.get_ident(),))
        watcher.start()
        watcher.join()
        return weakref.ref(logits)

    gc.disable()
    try:
        assert step()() is None
    finally:
        gc.enable()
