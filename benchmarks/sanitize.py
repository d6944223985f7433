"""NVIDIA's compute-sanitizer over one small launch of every operator: accesses out of bounds, races in shared memory.

    python benchmarks/sanitize.py [--seconds 240]

Every tensor is an allocation of its own here, so that one cannot be read through its neighbour. racecheck leaves out the operators whose
matrix products are the vendor's library.
"""

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

CHECKS = {
    "memcheck": "rms_norm add_rms_norm swiglu rope attention decode_attention linear_cross_entropy lora_linear adamw".split(),
    "racecheck": "rms_norm add_rms_norm swiglu rope attention decode_attention adamw".split(),
}
FOUND = 86  # exit code of the tool where it found something
PLACES = "/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"


def find_tool() -> str | None:
    """On PATH or where CUDA's installer puts it."""
    home = os.environ.get("CUDA_HOME")
    places = [os.environ.get("PATH", ""), *([f"{home}/bin", f"{home}/compute-sanitizer"] if home else []), PLACES]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(places))


def command(tool: str, check: str, operators: Sequence[str]) -> list[str]:
    """One check of these operators."""
    program = [sys.executable, str(Path(__file__).with_name("correctness.py")), "--small", "--operators", *operators]
    return [tool, "--tool", check, "--error-exitcode", str(FOUND), "--target-processes", "all", *program]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=240, help="limit of each check")
    limit = parser.parse_args().seconds
    tool = find_tool()
    if tool is None:
        print("compute-sanitizer: left out, there is none here")
        return 0
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    failed = False
    for check, operators in CHECKS.items():
        try:
            code = subprocess.run(command(tool, check, operators), env=environment, timeout=limit).returncode
            outcome = {0: "clean", FOUND: "found something"}.get(code, f"exit code {code}")
        except subprocess.TimeoutExpired:
            outcome = f"not done after {limit:.0f} s"
        print(f"compute-sanitizer {check}: {outcome}", flush=True)
        failed |= outcome != "clean"
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
