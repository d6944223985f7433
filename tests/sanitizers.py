"""Tests in a Python that gcc's sanitizers watch."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ADDRESS, THREAD = "address,undefined", "thread"  # gcc's -fsanitize
# The interpreter leaks, and torch has its own ways of ordering threads.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0",
    "TSAN_OPTIONS": "ignore_noninstrumented_modules=1:halt_on_error=1",
}


def need(sanitizer: str) -> None:
    """Skip where a program with this sanitizer cannot be made."""
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("needs Linux and g++")
    missing = [path for path in _libraries(sanitizer) if not path.is_file()]
    if missing:
        pytest.skip(f"this g++ comes without {missing[0]}")


def run_tests(library: Path, sanitizer: str, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """pytest with these arguments on `library` in place of `lumi._csrc`, and what it printed, as stdout. It
    ends at the first finding."""
    script = ROOT / "tests" / "processes" / "csrc_processes.py"
    return subprocess.run(
        [sys.executable, script, library, "-x", "-s", *arguments],
        cwd=ROOT,
        env=os.environ | OPTIONS | {"LD_PRELOAD": " ".join(map(str, _libraries(sanitizer)))},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def _libraries(sanitizer: str) -> list[Path]:
    # The sanitizer before libstdc++, or it does not find what throws exceptions.
    names = {ADDRESS: "libasan.so", THREAD: "libtsan.so"}[sanitizer], "libstdc++.so"
    ask = lambda name: subprocess.run(
        ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()
    return [Path(os.path.realpath(ask(name))) if "/" in ask(name) else Path(name) for name in names]
