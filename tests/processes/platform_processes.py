"""Trains on another system, as far as Python can tell: `python platform_processes.py SYSTEM ARGUMENTS...`.

Without the modules and functions that the system lacks, without Triton and without compiled operators.
"""

import importlib
import os
import pkgutil
import signal
import sys

LACKS = {
    "darwin": {"triton"},
    "win32": {"triton", "fcntl", "resource", "pwd", "grp", "termios", "pty", "tty"},
}
POSIX = (
    "fork setpgrp setsid killpg getpgid getuid geteuid sched_getaffinity mkfifo statvfs posix_fadvise".split()
)


class Lacking:
    """Finds none of some modules."""

    def __init__(self, names: set[str]):
        self.names = names

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in self.names:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def become(system: str) -> None:
    """Make this process look like `system` to what is imported from now on."""
    # The libraries of this system stay as they are.
    for name in (
        "torch",
        "datasets",
        "matplotlib.pyplot",
        "tokenizers",
        "sentencepiece",
        "rensa",
        "ftfy",
        "jinja2",
    ):
        importlib.import_module(name)
    for name in ("fastapi", "uvicorn", "prometheus_client", "gguf", "torch.distributed.checkpoint"):
        importlib.import_module(name)
    for name in [name for name in sys.modules if name.split(".")[0] in LACKS[system]]:
        del sys.modules[name]
    sys.meta_path.insert(0, Lacking(LACKS[system]))
    sys.modules["lumi._csrc"] = None  # to Python it is not there
    sys.platform = system
    if system == "win32":
        for name in POSIX:
            vars(os).pop(name, None)
        for name in ("SIGKILL", "SIGHUP", "SIGUSR1", "SIGALRM", "SIGCHLD", "SIGTSTP"):
            vars(signal).pop(name, None)


def import_all() -> int:
    """Import every module of Lumi; returns how many there are."""
    import lumi

    names = [module.name for module in pkgutil.walk_packages(lumi.__path__, "lumi.")]
    for name in names:
        if name != "lumi._csrc":
            importlib.import_module(name)
    return len(names)


if __name__ == "__main__":
    become(sys.argv[1])
    print(import_all(), "modules")
    import lumi.command_line
    import lumi.train

    sys.exit(lumi.command_line.run(lumi.train.main, sys.argv[2:]))
