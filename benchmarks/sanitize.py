"""NVIDIA's compute-sanitizer over small launches of every operator: out-of-bounds accesses, shared-memory
races.

    python benchmarks/sanitize.py [--seconds 240] [--checks memcheck racecheck] [--operators attention ...]

Run it after `correctness.py`, which leaves the compiled kernels in Triton's cache. Every tensor is a separate
allocation here, so that a read past its end does not land in a neighbour.

memcheck must be clean; old versions of it took in-bounds reads of Hopper's tensor cores for faults
(NVIDIA/compute-sanitizer-samples issue 19). The findings of racecheck are shown and fail nothing: it reports
races in Triton's reductions that are none (triton-lang/triton issues 4736 and 7264). racecheck leaves out the
operators whose matrix products are the vendor's library.
"""

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from run_all import run_one

_OWN_KERNELS = "rms_norm add_rms_norm swiglu rope attention decode_attention adamw".split()
CHECKS = {
    "memcheck": [*_OWN_KERNELS, "linear_cross_entropy", "lora_linear"],
    "racecheck": _OWN_KERNELS,
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
    parser.add_argument("--checks", nargs="+", choices=CHECKS, default=list(CHECKS))
    parser.add_argument("--operators", nargs="+", choices=CHECKS["memcheck"], default=CHECKS["memcheck"])
    args = parser.parse_args()
    tool = find_tool()
    if tool is None:
        print("compute-sanitizer: left out, there is none here")
        return 0
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for check in args.checks:
        operators = [operator for operator in CHECKS[check] if operator in args.operators]
        problem = run_one(command(tool, check, operators), args.seconds, environment)
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
