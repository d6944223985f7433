"""The tests of the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ("csrc", "kernels", "configs", "lumi", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FLAGS = "-fsanitize=address,undefined -fno-sanitize-recover=undefined -g"
TESTS = ("test_native_operators.py", "test_adamw.py", "test_global_norm.py")
RUN = """
import importlib.util, sys
import torch  # first: it must find its own libraries
spec = importlib.util.spec_from_file_location("lumi._csrc", sys.argv[1])
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
sys.modules["lumi._csrc"] = module
import lumi
lumi._csrc = module
import pytest
sys.exit(pytest.main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """`lumi._csrc`, built with the sanitizers from a copy of the sources."""
    folder = tmp_path_factory.mktemp("sanitized")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        else:
            shutil.copy(ROOT / name, folder / name)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", "wheels", "."]
    environment = os.environ | dict.fromkeys(("CFLAGS", "CXXFLAGS", "LDFLAGS"), FLAGS) | {"LUMI_CUDA": "0"}
    subprocess.run(command, cwd=folder, env=environment, check=True)
    (wheel,) = (folder / "wheels").glob("*.whl")
    with zipfile.ZipFile(wheel) as files:
        (name,) = (name for name in files.namelist() if "_csrc" in name)
        path = files.extract(name, folder / "wheels")
    assert b"__asan_report_load" in Path(path).read_bytes()  # or the flags did not reach the compiler
    return path


@pytest.mark.soak
@pytest.mark.skipif(sys.platform != "linux" or not shutil.which("gcc"), reason="needs Linux and gcc")
@pytest.mark.parametrize("file", TESTS)
def test_nothing_is_read_or_written_out_of_bounds(file, library):
    # Before libstdc++, or the sanitizer does not find what throws exceptions.
    libraries = [
        os.path.realpath(
            subprocess.run(
                ["gcc", f"-print-file-name={name}"], capture_output=True, text=True, check=True
            ).stdout.strip()
        )
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
    }
    command = [sys.executable, "-c", RUN, library, "-x", "-s", str(ROOT / "tests" / "kernels" / file)]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, (result.stdout + result.stderr)[-5000:]
    assert " passed" in result.stdout
