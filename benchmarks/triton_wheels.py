"""Other versions of Triton than the installed one, each in a folder of its own: `build/triton-3.6.0`."""

import subprocess
import sys
import tempfile
from pathlib import Path

BUILD = Path(__file__).parents[1] / "build"


def folder(version: str) -> Path:
    """Where Triton `version` lies, to be put first on PYTHONPATH. pip fetches it the first time.

    Exits with one line if pip cannot.
    """
    place = BUILD / f"triton-{version}"
    if not (place / "triton").is_dir():
        BUILD.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=BUILD) as part:
            wheel = Path(part) / "wheel"
            command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", wheel]
            done = subprocess.run([*command, f"triton=={version}"], capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip() or "pip said nothing").splitlines()[-1]
                sys.exit(f"--triton must be a version that pip can install, got {version!r}: {reason}")
            wheel.rename(place)
    return place
