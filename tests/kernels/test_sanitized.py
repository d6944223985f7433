"""The tests of the C++ operators under AddressSanitizer and UndefinedBehaviorSanitizer."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from sanitizers import ADDRESS, ROOT, need, run_tests

SOURCES = ("csrc", "kernels", "configs", "lumi", "setup.py", "pyproject.toml", "README.md", "LICENSE")
FLAGS = f"-fsanitize={ADDRESS} -fno-sanitize-recover=undefined -g"
TESTS = ("test_native_operators.py", "test_adamw.py", "test_global_norm.py")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """`lumi._csrc`, built with the sanitizers from a copy of the sources."""
    need(ADDRESS)
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
@pytest.mark.parametrize("file", TESTS)
def test_nothing_is_read_or_written_out_of_bounds(file, library):
    result = run_tests(library, ADDRESS, ROOT / "tests" / "kernels" / file)
    assert result.returncode == 0, result.stdout[-5000:]
    assert " passed" in result.stdout
