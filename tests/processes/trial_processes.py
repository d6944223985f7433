"""A training that only pretends, in a process of its own: it writes a run folder as `lumi/train.py` does.

Its loss is lowest at a peak learning rate of 0.01. A rate of 1e9 fails, one of 1e10 is killed, and one of
1e11 waits for ever before its first step.
"""

import json
import math
import multiprocessing
import os
import signal
import sys
import time
from pathlib import Path

from lumi.config import write_json

STEPS, EVERY = 12, 4


def begin(arguments, log, environment):
    """In the place of `lumi.sweeps.trial_process.begin`."""
    process = multiprocessing.get_context("spawn").Process(target=_pretend, args=(arguments, environment))
    process.start()
    return process


def starts(folder):
    """How often the training of a folder was begun."""
    return len((folder / "starts").read_text().splitlines())


def _pretend(arguments, environment):
    folder = Path(arguments[arguments.index("--output-dir") + 1])
    values = dict(argument.split("=") for argument in arguments if "=" in argument)
    lr, seed = float(values["optimizer.peak_lr"]), int(values["seed"])
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "starts").open("a") as file:
        file.write(json.dumps(environment) + "\n")
    signal.signal(signal.SIGTERM, lambda *_: _leave(folder, "preempted", 143))
    _status(folder, "running")
    if lr == 1e9:
        _leave(folder, "failed", 2, message="the loss was not finite")
    if lr == 1e10:
        os.kill(os.getpid(), signal.SIGKILL)
    while lr == 1e11:
        time.sleep(0.05)
    _train(folder, lr, seed)
    _leave(folder, "finished", 0)


def _train(folder, lr, seed):
    metrics = folder / "metrics.jsonl"
    done = [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []
    for step in range(max(done, default=0) + 1, STEPS + 1):
        with metrics.open("a") as file:
            record = {"step": step, "kind": "train", "loss": 1.0, "tokens": 64 * step, "step_seconds": 0.5}
            lines = [record]
            if step % EVERY == 0:
                bits = 1 + abs(math.log10(lr / 0.01)) + seed / 100 + 1 / step
                lines.append({"step": step, "kind": "validation", "loss": bits, "bits_per_byte": bits})
            file.write("".join(json.dumps(line) + "\n" for line in lines))
        if step == EVERY and "waits" in folder.parent.parent.name:
            time.sleep(60)  # the rung's decision must come by a signal


def _status(folder, status, **more):
    write_json(folder / "status.json", {"status": status, "step": 0, **more})


def _leave(folder, status, code, **more):
    _status(folder, status, **more)
    sys.stdout.flush()
    os._exit(code)
