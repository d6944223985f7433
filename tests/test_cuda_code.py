"""What nvcc made of csrc/*.cu, for GPUs that need not be here: the machine code inside the extension as it is
installed is read."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumi import _csrc

ROOT = Path(__file__).parent.parent
ARCHES = {"sm_80", "sm_89", "sm_90", "sm_100"}
KERNELS = {"partial_norm_kernel", "finish_norm_kernel", "adamw_kernel", "begin_kernel"}
FLOAT64 = re.compile(r"(DADD|DMUL|DFMA|DSETP|DMNMX)|.*\.F64|MUFU\.\w+64")


@pytest.fixture(scope="module")
def cuobjdump():
    if not _csrc.has_cuda:
        pytest.skip("Lumi was installed without an nvcc: there is no CUDA code to read")
    triton = pytest.importorskip(
        "triton", reason="Triton, whose wheel brings cuobjdump, is not installed here"
    )
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return lambda flag: (
        subprocess.run([tool, flag, _csrc.__file__], check=True, capture_output=True, text=True).stdout
    )


def by_kernel(listing):
    """(architecture, kernel) -> the part of a cuobjdump listing that is about it."""
    parts = {}
    for section in re.split(r"^arch = ", listing, flags=re.MULTILINE)[1:]:
        arch, *functions = re.split(r"^\s*Function\s*:?\s*", section, flags=re.MULTILINE)
        for function in functions:
            symbol = function.split()[0]
            [kernel] = [name for name in KERNELS if f"{len(name)}{name}" in symbol]
            parts[arch.split()[0], kernel] = function
    return parts


@pytest.fixture(scope="module")
def opcodes(cuobjdump):
    pattern = re.compile(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return {key: pattern.findall(text) for key, text in by_kernel(cuobjdump("-sass")).items()}


def test_every_kernel_is_there_for_every_architecture(opcodes, cuobjdump):
    assert opcodes.keys() == {(arch, kernel) for arch in ARCHES for kernel in KERNELS}
    assert all("EXIT" in found for found in opcodes.values())
    assert "sm_100.ptx" in cuobjdump("-lptx")  # for GPUs still newer


def test_nothing_spills_and_blocks_can_be_resident(opcodes, cuobjdump):
    resources = by_kernel(cuobjdump("-res-usage"))
    assert resources.keys() == opcodes.keys()
    for key, text in resources.items():
        usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", text)}
        assert usage["STACK"] == 0, key
        assert usage["REG"] <= (64 if key[1] == "finish_norm_kernel" else 40), (
            key,
            usage,
        )  # 40: 6 blocks of 256 threads
        assert usage["SHARED"] <= 2048, key  # 1 KiB of each block's is the driver's own
        assert not [op for op in opcodes[key] if re.match(r"(LDL|STL)(\.|$)", op)], key


@pytest.mark.parametrize(
    ("kernel", "loads", "stores"), [("adamw_kernel", 4, 3), ("partial_norm_kernel", 1, 0)]
)
def test_memory_is_read_and_written_16_bytes_at_a_time(opcodes, kernel, loads, stores):
    for arch in ARCHES:
        found = opcodes[arch, kernel]
        assert sum(op.startswith("LDG.E.128") for op in found) >= loads, arch
        assert sum(op.startswith("STG.E.128") for op in found) >= stores, arch


def test_the_update_has_no_float64_instructions(opcodes):
    for arch in ARCHES:
        assert not [op for op in opcodes[arch, "adamw_kernel"] if FLOAT64.match(op)], arch
        assert [op for op in opcodes[arch, "partial_norm_kernel"] if FLOAT64.match(op)], (
            "what looks for them must find them"
        )


def test_the_norm_multiplies_and_adds_in_one_instruction(opcodes):
    """Double instructions are what it may have to wait for, and the compiler fuses none by itself here."""
    for arch in ARCHES:
        names = {op.split(".")[0] for op in opcodes[arch, "partial_norm_kernel"]}
        assert "DFMA" in names, arch
        assert "DMUL" not in names, arch


def test_no_cuda_library_is_needed_to_import():
    """The runtime is linked in; the driver's library is looked for at the first launch."""
    if not sys.platform.startswith("linux") or not shutil.which("readelf"):
        pytest.skip("needs Linux and readelf")
    dynamic = subprocess.run(
        ["readelf", "-d", _csrc.__file__], check=True, capture_output=True, text=True
    ).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.*)\]", dynamic)
    assert any("libc.so" in name for name in needed)
    assert not [name for name in needed if "cuda" in name]
