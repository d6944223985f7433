"""NVIDIA's compute-sanitizer over small launches of every operator: accesses out of bounds, races in shared memory.

    python benchmarks/sanitize.py [--seconds 240]

It is meant to run after `correctness.py`, which leaves the compiled kernels in Triton's cache. Every tensor is an allocation of its own
here, so that one cannot be read through its neighbour.

memcheck has to be clean; old versions of it took in-bounds reads of Hopper's tensor cores for faults (NVIDIA/compute-sanitizer-samples
issue 19). What racecheck finds is shown and fails nothing: it reports races in reductions of Triton's that are none (triton-lang/triton
issues 4736 and 7264). It leaves out the operators whose matrix products are the vendor's library.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from run_all import run_one

CHECKS = {
    "memcheck": "rms_norm add_rms_norm swiglu rope attention decode_attention linear_cross_entropy lora_linear adamw".split(),
    "racecheck": "rms_norm add_rms_norm swiglu rope attention decode_attention adamw".split(),
}
FOUND = 86  # exit code of the tool where it found something
FALSE_FINDINGS = {"racecheck"}
PLACES = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"


def find_tool() -> str | None:
    """On PATH or where CUDA's installer puts it."""
    home = os.environ.get("CUDA_HOME")
    places = [
        os.environ.get("PATH", ""),
        *([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []),
        PLACES,
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(tool: str, check: str, operators: Sequence[str]) -> list[str]:
    """One check of these operators."""
    program = [
        sys.executable,
        str(Path(__file__).with_name("correctness.py")),
        "--small",
        "--operators",
        *operators,
    ]
    return [tool, "--tool", check, "--error-exitcode", str(FOUND), "--target-processes", "all", *program]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=240, help="limit of each check")
    limit = parser.parse_args().seconds
    tool = find_tool()
    if tool is None:
        print("compute-sanitizer: left out, there is none here")
        return 0
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for check, operators in CHECKS.items():
        problem = run_one(command(tool, check, operators), limit, environment)
        found = problem == f"exit code {FOUND}"
        passed = problem is None or (found and check in FALSE_FINDINGS)
        outcome = "found something" if found else problem or "clean"
        print(
            f"compute-sanitizer {check}: {outcome}{', which fails nothing' if passed and problem else ''}",
            flush=True,
        )
        failed |= not passed
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
