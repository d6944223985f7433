"""Builds `lumi._csrc` from csrc/ and installs kernels/ and configs/ as `lumi.kernels` and `lumi.configs`.

The CUDA files are compiled if there is an nvcc in $CUDA_HOME/bin or, without that variable, on PATH.
LUMI_CUDA=0 leaves them out. LUMI_CUDA=1 makes a missing nvcc an error. LUMI_CUDA_ARCHES="90" compiles for
these architectures alone. LUMI_PURE=1 compiles nothing: the operators are those of plain torch, and the wheel
fits any machine.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import find_packages, setup

# No -march=native: a wheel must run on other machines than the one that built it. Without -fno-math-errno,
# loops with a square root are not vectorised. Threads come from OpenMP where the usual compiler has it, else
# from std::thread. OpenMP is not linked: its symbols are found in the one that torch has loaded, whatever its
# file is called there. So there is one pool of threads, and a wheel needs no library that it lacks.
if sys.platform == "win32":
    compile_args = ["/O2"]
elif sys.platform == "darwin":
    compile_args = ["-O3", "-fno-math-errno"]
else:
    compile_args = ["-O3", "-fno-math-errno", "-fopenmp"]

# The CPU's operators are compiled once for each target; at run time the best that the processor has is taken.
CPU_TARGETS = {"portable": []}
if sys.platform == "linux" and platform.machine() == "x86_64":
    avx512 = [f"-mavx512{part}" for part in ("f", "bw", "dq", "vl")]
    CPU_TARGETS |= {"avx2": ["-mavx2", "-mfma"], "avx512": ["-mavx2", "-mfma", *avx512]}

CUDA_ARCHES = (80, 89, 90, 100)  # the last one also as portable code, for newer GPUs
OLDEST_NVCC = (12, 8)  # the first that knows sm_100


class BuildExtension(build_ext):
    """Adds the CUDA files, where there is an nvcc."""

    def build_extension(self, extension: Pybind11Extension) -> None:
        # setuptools would look at the sources' times alone, and miss another LUMI_CUDA or nvcc.
        self.force = True
        if os.environ.get("LUMI_CUDA") != "0":
            try:
                self._add_cuda(extension, *_find_cuda())
            except FileNotFoundError as error:
                if os.environ.get("LUMI_CUDA") == "1":
                    raise
                message = "lumi._csrc is built without its CUDA operators; on a GPU, torch's take their place"
                print(f"warning: {error}: {message}", file=sys.stderr)
        if sys.platform != "win32":  # its compiler lacks the vectors that these are written in
            self._add_cpu_targets(extension)
        super().build_extension(extension)

    def _add_cpu_targets(self, extension: Pybind11Extension) -> None:
        for target, flags in CPU_TARGETS.items():
            extension.extra_objects += self.compiler.compile(
                ["csrc/cpu/target.cpp"],
                output_dir=str(Path(self.build_temp) / target),
                macros=[("LUMI_TARGET", target)],
                extra_postargs=["-std=c++17", "-fvisibility=hidden", "-Wno-psabi", *compile_args, *flags],
            )
        extension.sources.append("csrc/cpu/choose.cpp")
        extension.define_macros.append(("LUMI_HAS_CPU", None))
        if len(CPU_TARGETS) > 1:
            extension.define_macros.append(("LUMI_X86_TARGETS", None))

    def _add_cuda(self, extension: Pybind11Extension, nvcc: str, library_dir: str) -> None:
        folder = Path(self.build_temp) / "cuda"
        folder.mkdir(parents=True, exist_ok=True)
        arches = os.environ.get("LUMI_CUDA_ARCHES", "").split() or CUDA_ARCHES
        targets = [f"arch=compute_{arch},code=sm_{arch}" for arch in arches]
        targets.append(f"arch=compute_{arches[-1]},code=compute_{arches[-1]}")
        # Without -fmad=false, nvcc fuses products path by path: results would depend on where tensors lie.
        flags = "-std=c++17 -O3 -fmad=false --threads 2 -Xcompiler -fPIC,-fvisibility=hidden".split()
        flags += [flag for target in targets for flag in ("-gencode", target)]

        def compile_file(source: Path) -> str:
            target = folder / f"{source.stem}.o"
            command = [nvcc, *flags, "-c", str(source), "-o", str(target)]
            print(" ".join(command), flush=True)
            if subprocess.run(command).returncode != 0:
                remedy = "LUMI_CUDA=0 installs Lumi without its CUDA operators"
                raise RuntimeError(f"nvcc failed on {source}; {remedy}")
            return str(target)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            extension.extra_objects += pool.map(compile_file, sorted(Path("csrc").glob("*.cu")))
        extension.define_macros.append(("LUMI_HAS_CUDA", None))
        extension.library_dirs.append(library_dir)
        # Static: there is nothing to find at run time, and no version that could disagree with torch's.
        extension.libraries += ["cudart_static", "dl", "rt"]


def _find_cuda() -> tuple[str, str]:
    """nvcc and the folder of libcudart_static.a. Raises FileNotFoundError, which says what is missing."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=os.path.join(home, "bin") if home else None)
    if nvcc is None or not sys.platform.startswith("linux"):
        raise FileNotFoundError(f"no nvcc in {home}/bin" if home else "no nvcc found")
    printed = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    version = re.search(r"release (\d+)\.(\d+)", printed)
    if version is None or tuple(map(int, version.groups())) < OLDEST_NVCC:
        found, oldest = version[0] if version else "unreadable", ".".join(map(str, OLDEST_NVCC))
        raise FileNotFoundError(f"{nvcc} is {found}, older than {oldest}")
    # A dry run prints where nvcc's libraries are, however it was installed.
    dry_run = [nvcc, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull]
    plan = subprocess.run(dry_run, capture_output=True, text=True).stderr
    for folder in re.findall(r'"-L([^"]+)"', plan):
        if Path(folder, "libcudart_static.a").exists():
            return nvcc, folder
    raise FileNotFoundError(f"{nvcc} has no libcudart_static.a beside it")


ParallelCompile().install()
setup(
    packages=[*find_packages(include=["lumi", "lumi.*"]), "lumi.kernels", "lumi.configs"],
    package_dir={"lumi.kernels": "kernels", "lumi.configs": "configs"},
    package_data={
        "lumi": ["py.typed"],
        "lumi.configs": ["**/*.json"],
        "lumi.kernels": ["*.json"],
        "lumi.corpus": ["*.jinja"],
        "lumi.host": ["*.jinja"],
        "lumi.reporting": ["*.jinja"],
        "lumi.server": ["*.html"],
    },
    ext_modules=[]
    if os.environ.get("LUMI_PURE") == "1"
    else [
        Pybind11Extension(
            "lumi._csrc",
            sorted(path.as_posix() for path in Path("csrc").glob("*.cpp")),
            depends=sorted(path.as_posix() for path in Path("csrc").rglob("*.*") if path.suffix != ".cpp"),
            include_dirs=["csrc"],
            cxx_std=17,
            extra_compile_args=compile_args,
        )
    ],
    cmdclass={"build_ext": BuildExtension},
)
