"""A trial's training in a process of its own.

The module imports nothing that reads the environment: the process sets it before it imports torch.
"""

import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path


def begin(arguments: Sequence[str], log: Path, environment: Mapping[str, str]) -> BaseProcess:
    """Start `lumi/train.py` in a process. SIGTERM, or the end of this process, makes it save and leave.

    Args:
        arguments: of the training's command line.
        log: what it prints is appended to this file.
        environment: variables that it gets beside those of this process.
    """
    spawn = multiprocessing.get_context("spawn")
    process = spawn.Process(target=_train, args=(list(arguments), log, dict(environment)))
    process.start()
    return process


def _train(arguments: list[str], log: Path, environment: dict[str, str]) -> None:
    if hasattr(os, "setpgrp"):
        os.setpgrp()  # Ctrl-C reaches the sweep alone, which ends its trials itself
    os.environ.update(environment)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        file.write(f"train.py {' '.join(arguments)}\n")
        file.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    parent = multiprocessing.parent_process()
    assert parent is not None
    # A sweep that is killed cannot end its trials: the next call would find their folders in use.
    threading.Thread(target=_stop_after, args=(parent.sentinel,), daemon=True).start()
    import lumi.command_line
    import lumi.train

    sys.exit(lumi.command_line.run(lumi.train.main, arguments))


def _stop_after(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os.kill(os.getpid(), signal.SIGTERM)
