"""Test cases in forks of one process that has torch imported, for importing it takes longer than most cases.

`run_case("saver_processes", "layouts", folder)` calls `saver_processes.main("layouts", folder)` in a process
of its own. The server is started by the first case of a pytest process; it imports a module once, forks for
every case, and ends with pytest. `python case_server.py` is the server.
"""

import atexit
import contextlib
import functools
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path

DEADLINE_SECONDS = 240


class Case:
    """A case that was started. `log` is what its processes print."""

    def __init__(self, module, *arguments, log):
        self._log = Path(log)
        self._log.parent.mkdir(parents=True, exist_ok=True)
        question = {"module": module, "arguments": [str(each) for each in arguments], "log": str(log)}
        self.pid = _ask(question)
        assert isinstance(self.pid, int), f"{module} cannot be imported:\n{self.pid}"

    @property
    def log(self):
        return self._log.read_text()

    def poll(self):
        """The exit code, below 0 where a signal ended it; None while it runs."""
        return _ask({"pid": self.pid, "seconds": 0})

    def wait(self):
        """Wait for the end; returns the exit code. Fails after the deadline."""
        code = _ask({"pid": self.pid, "seconds": DEADLINE_SECONDS})
        assert code is not None, f"the case did not end in {DEADLINE_SECONDS} s:\n{self.log[-6000:]}"
        return code

    def kill(self):
        """End the case and all that it has started."""
        _kill_group(self.pid)


def run_case(module, *arguments, log):
    """Run a case to its end, which must be a good one; returns what it prints."""
    case = Case(module, *arguments, log=log)
    try:
        code = case.wait()
    finally:
        case.kill()
    assert code == 0, f"exit code {code}:\n{case.log[-6000:]}"
    return case.log


def _ask(question):
    server = _server()
    print(json.dumps(question), file=server.stdin, flush=True)
    return json.loads(server.stdout.readline())


@functools.cache
def _server():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-W", "ignore", __file__]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, env=environment, text=True, **pipes)
    atexit.register(server.communicate)  # closes its input, which ends it
    return server


def _kill_group(leader):
    with contextlib.suppress(ProcessLookupError, PermissionError):  # it is over; macOS says the latter
        os.killpg(leader, signal.SIGKILL)


def serve():
    """A line of JSON asks for a process, or how one ended; a line answers.

    Ends, with all cases, when the input does.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a module prints is no answer
    codes = {}
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            answer = _wait_for(codes, **question)
        else:
            answer = _start(answers, **question)
            codes[answer] = None
        print(json.dumps(answer), file=answers, flush=True)
    for pid, code in codes.items():
        if code is None and isinstance(pid, int):
            _kill_group(pid)


def _start(answers, module, arguments, log):
    """Fork for a case; returns the process's id, or why the module cannot be imported."""
    try:
        imported = importlib.import_module(module)
    except Exception:
        return traceback.format_exc()
    if (pid := os.fork()) == 0:
        answers.close()
        _run_case(imported, arguments, log)
    _lead_group(pid)
    return pid


def _lead_group(pid):
    """A group of its own, to be killed together; both sides say so, for either may be late."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.setpgid(pid, pid)


def _run_case(module, arguments, log):
    _lead_group(0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    code = 0
    try:
        module.main(*arguments)
    except Exception:
        sys.excepthook(*sys.exc_info())
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # Python's clean-up costs more than most cases; a SystemExit ends in the usual way


def _wait_for(codes, pid, seconds):
    deadline = time.monotonic() + seconds
    while codes[pid] is None:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            codes[pid] = os.waitstatus_to_exitcode(status)
        elif time.monotonic() >= deadline:
            break
        else:
            time.sleep(0.005)
    return codes[pid]


if __name__ == "__main__":
    serve()
