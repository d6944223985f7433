"""csrc/*.cu compiled for the CPU by g++, with a sanitizer.

The headers of tests/csrc stand in for CUDA's. What C++ cannot parse is rewritten here: launches, and
`__grid_constant__` parameters, which become references because no thread has a copy of its own.
"""

import re
import subprocess
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pybind11
from sanitizers import ROOT

CSRC, DEVICE = ROOT / "csrc", ROOT / "tests" / "csrc"
_PYTHON = [f"-I{path}" for path in (sysconfig.get_path("include"), pybind11.get_include())]
_COMPILE = ["g++", "-std=c++17", "-fPIC", f"-I{DEVICE}", f"-I{CSRC}", *_PYTHON]
# Without fused products, as setup.py has it for nvcc.
_KERNELS = "-O1 -g -ffp-contract=off -fno-sanitize-recover=undefined".split()


def translate(path: Path, change: Callable[[str], str] = str) -> str:
    """C++ of a CUDA file, `change`d before; messages still name the file's own lines."""
    source = re.sub(r"(\w+)<<<([^>]*)>>>", r"cuda_on_cpu::launch(\1, \2)", change(path.read_text()))
    source = re.sub(r"\bconst __grid_constant__ (\w+) (\w+)", r"const \1& \2", source)
    assert "<<<" not in source, f"{path}: a launch that is not understood"
    assert "__grid_constant__" not in source, f"{path}: a parameter that is not understood"
    return f'#line 1 "{path}"\n{source.replace("#pragma unroll", "#pragma GCC unroll")}'


def compile_host(folder: Path) -> list[Path]:
    """What needs no sanitizer: the bindings, csrc/*.cpp and the device. Returns their objects."""
    sources = [*sorted(CSRC.glob("*.cpp")), DEVICE / "threads.cpp"]
    flags = {"bindings": ["-O0", "-fvisibility=hidden", "-DLUMI_HAS_CUDA"]}

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        command = [*_COMPILE, *flags.get(source.stem, ["-O1"]), "-c", source, "-o", target]
        subprocess.run(command, check=True)
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def compile_kernels(
    folder: Path, sanitizer: str, sources: list[Path], change: Callable[[str], str] = str
) -> list[Path]:
    """Objects of CUDA files, with the sanitizer (gcc's -fsanitize)."""
    folder.mkdir(parents=True, exist_ok=True)

    def compile_one(source: Path) -> Path:
        translated, target = folder / f"{source.stem}.cu.cpp", folder / f"{source.stem}.cu.o"
        translated.write_text(translate(source, change))
        subprocess.run(
            [*_COMPILE, *_KERNELS, f"-fsanitize={sanitizer}", "-c", translated, "-o", target], check=True
        )
        return target

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(compile_one, sources))


def link(target: Path, sanitizer: str, objects: list[Path]) -> Path:
    """A program, or a library if `target` ends with .so."""
    shared = ["-shared"] if target.suffix == ".so" else []
    subprocess.run(["g++", *shared, f"-fsanitize={sanitizer}", *objects, "-o", target], check=True)
    return target
