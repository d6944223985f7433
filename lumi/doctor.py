"""`lumi doctor`: what this machine is, what is installed, which kernels run where, what is missing.

What is needed and does not work is a fault. What only some users need is a remark.
"""

import importlib.metadata
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement

from lumi.config import UserError

DISTRIBUTION = "lumi-train"
DRIVER = Path("/proc/driver/nvidia/gpus")  # one folder for each GPU that NVIDIA's driver on Linux sees
VECTORS = ("avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl")  # what csrc/cpu is compiled for
HEAD_DIM = 64  # of the models that the table of kernels is about

Rows = list[tuple[str, str]]


def doctor() -> int:
    """Print the sections.

    Returns:
        The exit code: 1 where something that Lumi needs is broken.

    Raises:
        UserError: Lumi runs from a folder that was never installed.
    """
    if _version(DISTRIBUTION) is None:
        raise UserError(DISTRIBUTION, "must be installed", remedy="from a clone: pip install --editable .")
    installed, faults = _packages()
    sections = {"installed": installed, "extras": _extras()}
    try:
        import torch  # noqa: F401 - what is broken here is a finding

        from lumi.kernels.native import csrc
    except (ImportError, OSError) as error:  # OSError: of a library that torch loads
        faults.append(("import", f"{type(error).__name__}: {error}"))
    else:
        faults += _triton_faults()
        missing = _missing(csrc)
        sections = (
            {"machine": _machine()}
            | sections
            | {f"kernels that auto takes, for heads of {HEAD_DIM}": _kernels()}
        )
        sections |= {"missing": missing} if missing else {}
    sections |= {"broken": faults} if faults else {}
    for title, rows in sections.items():
        print(title)
        for name, text in rows:
            print(f"  {name:<15} {text}")
    return 1 if faults else 0


def _packages() -> tuple[Rows, Rows]:
    """What Lumi needs, with versions, and what is wrong with it."""
    rows: Rows = [("python", f"{platform.python_version()}, {sys.executable}")]
    faults: Rows = []
    rows.append((DISTRIBUTION, f"{importlib.metadata.version(DISTRIBUTION)}, {Path(__file__).parent}"))
    for requirement in _requirements(""):
        found = _version(requirement.name) or "not installed"
        rows.append((requirement.name, found))
        if not _is_met(requirement):
            wanted = f"{requirement.name}{requirement.specifier}"
            faults.append((requirement.name, f"{found}; run: pip install '{wanted}'"))
    return rows, faults


def _extras() -> Rows:
    """Which of the optional parts can be used."""
    rows: Rows = []
    for extra in importlib.metadata.metadata(DISTRIBUTION).get_all("Provides-Extra") or ():
        lacking = [
            f"{requirement.name}{requirement.specifier}"
            for requirement in _requirements(extra)
            if not _is_met(requirement)
        ]
        remedy = f"lacks {', '.join(lacking)}; run: pip install '{DISTRIBUTION}[{extra}]'"
        rows.append((extra, remedy if lacking else "ready"))
    return rows


def _requirements(extra: str) -> Iterator[Requirement]:
    """Of an extra, or of Lumi itself for "", on this machine."""
    for line in importlib.metadata.requires(DISTRIBUTION) or ():
        requirement = Requirement(line)
        of_all, of_this = (
            requirement.marker is None or requirement.marker.evaluate({"extra": name}) for name in ("", extra)
        )
        if not of_this or (extra and of_all):
            continue
        if requirement.name == DISTRIBUTION:  # one extra takes others
            for other in sorted(requirement.extras):
                yield from _requirements(other)
        else:
            yield requirement


def _is_met(requirement: Requirement) -> bool:
    version = _version(requirement.name)
    return version is not None and requirement.specifier.contains(version, prereleases=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _machine() -> Rows:
    import torch

    from lumi.host.devices import BFLOAT16_FLAGS, cpu_flags, cpu_name
    from lumi.host.memory import free_memory
    from lumi.host.workers import num_cores

    processor = cpu_name() or platform.processor() or platform.machine()
    flags, useful = cpu_flags(), (*VECTORS, *sorted(BFLOAT16_FLAGS))
    has = [flag for flag in useful if flag in flags]
    lacks = [flag for flag in useful if flag not in flags]
    rows = [
        ("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        ("cpu", f"{processor}; {num_cores()} cores for this process, {torch.get_num_threads()} threads"),
        ("instructions", f"{' '.join(has) or 'none known'}{'; not ' + ' '.join(lacks) if lacks else ''}"),
        ("memory", _gibibytes(free_memory(torch.device("cpu")))),
    ]
    for index in range(torch.cuda.device_count()):
        device = torch.device("cuda", index)
        major, minor = torch.cuda.get_device_capability(device)
        name = f"{torch.cuda.get_device_name(device)}, compute capability {major}.{minor}"
        rows.append((str(device), f"{name}, {_gibibytes(free_memory(device))}"))
    if torch.backends.mps.is_available():
        rows.append(("mps", "Apple's GPU; nobody has tested Lumi on one"))
    if len(rows) == 4:
        rows.append(("gpu", "none that torch sees"))
    return rows


def _gibibytes(size: int | None) -> str:
    return "unknown" if size is None else f"{size / 2**30:.1f} GiB free"


def _kernels() -> Rows:
    """What `"kernels": "auto"` takes, for each device and dtype, and what the optimizer's step runs on."""
    import torch

    from lumi.host.devices import fast_bfloat16
    from lumi.kernels.bundle import select
    from lumi.kernels.native import cpu_operators, has_native

    names = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    names += ["mps"] if torch.backends.mps.is_available() else []
    rows: Rows = []
    for device in map(torch.device, names):
        texts = []
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            try:
                kernels = select("auto", device, HEAD_DIM, dtype).name
            except ValueError as error:
                kernels = f"none ({error})"
            kernels += f" ({cpu_operators(dtype).target})" if kernels == "native" else ""
            texts.append(f"{str(dtype).removeprefix('torch.')} {kernels}")
        texts.append(f"AdamW {'compiled' if has_native(device) else 'in plain torch'}")
        texts.append(f"bfloat16 products {'in hardware' if fast_bfloat16(device) else 'slow'}")
        rows.append((str(device), ", ".join(texts)))
    return rows


def _triton_faults() -> Rows:
    """What Triton lacks to launch a kernel on a GPU: it compiles a small launcher in C for each."""
    import torch

    from lumi.kernels.optional_triton import HAS_TRITON

    rows: Rows = []
    if not (torch.cuda.is_available() and HAS_TRITON):
        return rows
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        rows.append(("C compiler", "Triton finds neither gcc nor clang; run: apt-get install gcc"))
    if not Path(sysconfig.get_paths()["include"], "Python.h").is_file():
        rows.append(("Python.h", "Triton needs Python's headers; run: apt-get install python3-dev"))
    return rows


def _missing(csrc: object) -> Rows:
    """What this machine could use and does not have, and how to get it."""
    import torch

    from lumi.kernels.native import has_cpu_operators

    rows: Rows = []
    source = "from a clone: pip install --editable ."
    if csrc is None:
        wheel = "a wheel for this system and Python has them"
        rows.append(("C++ operators", f"{wheel}; with a C++ compiler, {source}"))
    elif not has_cpu_operators(torch.float32):
        rows.append(("C++ operators", "the compiler of this system could not build those of the model"))
    if torch.cuda.is_available() and not getattr(csrc, "has_cuda", False):
        rows.append(("CUDA optimizer", f"with nvcc 12.8 or newer on PATH, {source}"))
    if DRIVER.is_dir() and any(DRIVER.iterdir()) and not torch.cuda.is_available():
        text = f"torch {torch.__version__} sees none of the GPUs here"
        rows.append(("CUDA", f"{text}; a CUDA build of torch and a driver new enough for it are needed"))
    return rows
