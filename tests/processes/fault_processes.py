"""Trainings to be hurt. `Forks` starts them as processes of their own in no time, forks of one process that
has torch imported; what is to happen at an exact place inside of one is a line of `faults`. `python
fault_processes.py` is that one process.
"""

import hashlib
import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

DEADLINE_SECONDS = 120


class Process:
    """One process of a run; `log` is what it prints."""

    def __init__(self, forks, pid, log):
        self.forks, self.pid, self.log_file, self.returncode = forks, pid, log, None

    def poll(self):
        return self._wait(0)

    def wait(self):
        assert self._wait(DEADLINE_SECONDS) is not None
        return self.returncode

    def kill(self, number=signal.SIGKILL):
        os.kill(self.pid, number)

    @property
    def log(self):
        return self.log_file.read_text()

    def _wait(self, seconds):
        if self.returncode is None:
            self.returncode = self.forks.ask({"pid": self.pid, "seconds": seconds})
        return self.returncode


class Forks:
    """Starts processes; a context, at whose end none is left."""

    def __enter__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.server = subprocess.Popen(
            [sys.executable, __file__],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.started = []
        return self

    def __exit__(self, *_):
        for process in self.started:
            if process.poll() is None:
                process.kill()
        self.server.communicate(timeout=DEADLINE_SECONDS)

    def ask(self, question):
        print(json.dumps(question), file=self.server.stdin, flush=True)
        return json.loads(self.server.stdout.readline())

    def start(self, arguments, logs, processes=None, faults=()):
        """Start `lumi/train.py` with these arguments.

        Args:
            logs: the folder for what the processes print.
            processes: None for one without the environment of torchrun; otherwise their number, with what
                torchrun would tell each.
            faults: (rank, name of a function below, its arguments).
        """
        logs.mkdir(exist_ok=True)
        group = {}
        if processes:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                group = {
                    "MASTER_ADDR": "127.0.0.1",
                    "MASTER_PORT": str(free.getsockname()[1]),
                    "WORLD_SIZE": str(processes),
                }
        started = []
        for rank in range(processes or 1):
            environment = group and {**group, "RANK": str(rank), "LOCAL_RANK": str(rank)}
            log = logs / f"{len(self.started)}-rank-{rank}"
            mine = [fault for of, *fault in faults if of == rank]
            pid = self.ask(
                {
                    "arguments": [str(part) for part in arguments],
                    "log": str(log),
                    "environment": environment,
                    "faults": mine,
                }
            )
            started.append(Process(self, pid, log))
        self.started += started
        return started


# What follows is done in the processes that are started.


def before(place, count, action, *arguments):
    """Do something at the `count`-th call of the function at `place`, before it."""
    module, _, names = place.partition(":")
    *owners, name = names.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    real, calls = getattr(owner, name), []

    def replacement(*values, **named):
        calls.append(1)
        if len(calls) == count:
            ACTIONS[action](*arguments)
        return real(*values, **named)

    setattr(owner, name, replacement)


def at_step(step, phase, action, *arguments):
    """Do something where the loop has come to a phase of a step: "micro-step 2", "optimizer", ..."""
    from lumi.parallel.watchdog import Watchdog

    real, left = Watchdog.mark, [action]

    def mark(self, at, name):
        real(self, at, name)
        if at == step and name.startswith(phase) and left:
            ACTIONS[left.pop()](*arguments)

    Watchdog.mark = mark


def kill_at_file_operation(count, place=None):
    """SIGKILL before (even) or after (odd) the count/2-th call that puts or takes something on the disk, in
    whatever thread it comes; counted from the first call of the function at `place`, or from the start.
    """
    operations, counting = itertools.count(), [place is None]

    def replacement(real, *values, **named):
        now = 2 * next(operations) if counting[0] else -2
        if now == count:
            kill()
        try:
            return real(*values, **named)
        finally:
            if now + 1 == count:
                kill()

    for name in ("fsync", "rename", "replace", "mkdir", "unlink", "rmdir"):
        setattr(os, name, partial(replacement, getattr(os, name)))
    if place:
        before(place, 1, "call", partial(counting.__setitem__, 0, True))


def spoil(steps, value, where):
    """Multiply what this process computes in some steps: its "loss", or its "gradient" alone."""
    from lumi.model.transformer import Transformer
    from lumi.parallel.watchdog import Watchdog

    real_mark, real_forward, now, value = Watchdog.mark, Transformer.forward, [0], float(value)

    def mark(self, step, phase):
        now[0] = step
        real_mark(self, step, phase)

    def forward(self, *arguments):
        import torch

        loss = real_forward(self, *arguments)
        if torch.is_grad_enabled() and now[0] in steps:
            if where == "loss":
                return loss * value
            loss.register_hook(lambda gradient: gradient * value)
        return loss

    Watchdog.mark, Transformer.forward = mark, forward


def leave_out_updates(steps):
    """The optimizer never hears of some steps: the truth for steps that are skipped."""
    from lumi.training.optimizer import Optimizer

    real, calls = Optimizer.step, []

    def step(self, *arguments):
        calls.append(1)
        if len(calls) not in steps:
            real(self, *arguments)

    Optimizer.step = step


def short_spike_window(window):
    import lumi.training.trainer

    real = lumi.training.trainer.LossSpikes
    lumi.training.trainer.LossSpikes = lambda max_sigmas: real(max_sigmas, window)


def leave_fingerprint(path):
    """At the run's end, the SHA-256 of all weights that this process holds."""
    import lumi.training.trainer

    real = lumi.training.trainer.Trainer.run_to_the_end

    def run(self):
        finished = real(self)
        digest = hashlib.sha256(
            b"".join(tensor.detach().numpy().tobytes() for tensor in self.model.parameters())
        )
        Path(path).write_text(digest.hexdigest())
        return finished

    lumi.training.trainer.Trainer.run_to_the_end = run


def kill():
    os.kill(os.getpid(), signal.SIGKILL)


def terminate():
    os.kill(os.getpid(), signal.SIGTERM)


def limit_files(num_bytes):
    """No file may grow larger: writing more fails as on a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def fill_disk(path, room):
    """Leave so many bytes of the disk free."""
    free = shutil.disk_usage(Path(path).parent).free
    Path(path).write_bytes(bytes(free - room))


ACTIONS = {
    "kill": kill,
    "terminate": terminate,
    "sleep": time.sleep,
    "limit_files": limit_files,
    "fill_disk": fill_disk,
    "truncate": os.truncate,
    "call": lambda work: work(),
}


def run_child(job):
    import lumi.train
    from lumi.command_line import run

    signal.alarm(DEADLINE_SECONDS)  # nobody is left over
    descriptor = os.open(job["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.environ.update(job["environment"])
    for name, *arguments in job["faults"]:
        globals()[name](*arguments)
    return run(lumi.train.main, job["arguments"])


def serve():
    """A line of JSON asks for a process, or how one ended; a line answers."""
    import torch
    import torch._dynamo  # a run imports it when it makes the model: here once, before the forks

    import lumi.train
    import lumi.training.run_log

    torch.set_num_threads(1)
    # Drawing takes longer than most of these runs.
    lumi.training.run_log.draw_loss = lambda metrics, picture, title, unit: Path(picture).touch()
    for line in sys.stdin:
        question = json.loads(line)
        if "pid" in question:
            answer = wait_for(**question)
        elif not (answer := os.fork()):
            code = 1
            try:
                code = run_child(question)
            except SystemExit as end:
                code = end.code
            except BaseException:
                sys.excepthook(*sys.exc_info())
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)  # Python's clean-up costs more than most of this
        print(json.dumps(answer), flush=True)


def wait_for(pid, seconds):
    """The exit code of a process, below 0 where a signal ended it; None where it is at work still."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            return None
        time.sleep(0.002)


if __name__ == "__main__":
    serve()
