"""Compiles the Triton kernels ahead of time for several GPUs, without any of them, and reads the machine
code.

    python benchmarks/inspect_kernels.py [--arch 90] [--dtype bf16] [--kernel rms_norm] [--largest] [--json]

One line per kernel, dtype, size and architecture: registers, shared memory, spills, 16-byte accesses (bulk
tensor copies included), tensor-core instructions, float64 instructions, the share of a multiprocessor's
threads that can be resident, and the fewest bytes that a row must move (of attention: a token and head).
`tests/kernels/test_machine_code.py` asserts on the same figures.

Spills are counted as instructions (LDL, STL) and as stack: the LOCAL field of the resource report reads 0
even when a kernel spills.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET must be unset or 0 to compile kernels, got 1")

import triton
from kernel_entries import Entry, entries
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHES = (80, 89, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one block may ask for
THREADS_PER_SM = {80: 2048, 89: 1536, 90: 2048, 100: 2048}
SHARED_PER_SM = {80: 167_936, 89: 102_400, 90: 233_472, 100: 233_472}  # bytes
REGISTERS_PER_SM = 65_536


@dataclass(frozen=True)
class Report:
    """The figures of one compilation. `occupancy` is an upper bound from registers, shared memory and
    threads."""

    kernel: str
    dtype: str
    arch: int
    num_warps: int
    registers: int
    shared_bytes: int
    shared_limit: int
    stack_bytes: int
    spill_instructions: int
    ldg_128: int
    stg_128: int
    fp64_instructions: int
    mma_instructions: int
    occupancy: float
    row_bytes: int
    missing: tuple[str, ...]


def inspect(entry: Entry, dtype: str, arch: int) -> Report:
    """Compile one entry for one dtype and architecture, and read its machine code."""
    function = getattr(importlib.import_module(entry.module), entry.kernel)
    signature = {name: _typed(kind, dtype) for name, kind in entry.signature.items()}
    signature |= dict.fromkeys(entry.constexprs, "constexpr")
    # Triton matches the arguments by position, so the signature follows the function's order.
    signature = {name: signature[name] for name in function.arg_names}
    attrs = {}
    for position, (name, kind) in enumerate(signature.items()):
        if name in entry.aligned or kind[0] == "*":
            paths = (
                [(position, part) for part in range(len(kind))] if isinstance(kind, tuple) else [(position,)]
            )
            attrs |= {path: [["tt.divisibility", 16]] for path in paths}
    source = ASTSource(function, signature, entry.constexprs, attrs)
    options = {"num_warps": entry.num_warps, "num_stages": entry.num_stages, "maxnreg": entry.maxnreg}
    compiled = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options)

    sass = _disassemble(compiled.asm["cubin"])
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", sass)}
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, re.MULTILINE)
    if not opcodes or resources.keys() != {"REG", "STACK", "SHARED"}:
        raise RuntimeError(f"{entry.name}: could not read the disassembler's output")
    counts = {
        "LDG.128": sum((op.startswith("LDG") and ".128" in op) or op.startswith("UTMALDG") for op in opcodes),
        "STG.128": sum((op.startswith("STG") and ".128" in op) or op.startswith("UTMASTG") for op in opcodes),
        "MMA": sum(bool(re.match(r"(HMMA|HGMMA|UTC\w*MMA)", op)) for op in opcodes),
        "HGMMA": sum(op.startswith("HGMMA") for op in opcodes),
        "UTCMMA": sum(bool(re.match(r"UTC\w*MMA", op)) for op in opcodes),
    }
    # Dynamic shared memory is not in the resource report.
    shared = max(resources["SHARED"], compiled.metadata.shared)
    return Report(
        kernel=entry.name,
        dtype=dtype,
        arch=arch,
        num_warps=entry.num_warps,
        registers=resources["REG"],
        shared_bytes=shared,
        shared_limit=SHARED_LIMIT[arch],
        stack_bytes=resources["STACK"],
        spill_instructions=sum(bool(re.match(r"(LDL|STL)(\.|$)", op)) for op in opcodes),
        ldg_128=counts["LDG.128"],
        stg_128=counts["STG.128"],
        fp64_instructions=sum(_is_float64(op) for op in opcodes),
        mma_instructions=counts["MMA"],
        occupancy=_occupancy(resources["REG"], shared, 32 * entry.num_warps, arch),
        row_bytes=entry.moved[0] * (4 if dtype == "fp32" else 2) + entry.moved[1] * 4,
        missing=tuple(
            name
            for name in entry.expects
            if not counts[name] and not (name.endswith("MMA") and dtype == "fp32")
        ),
    )


def _typed(kind: str | tuple[str, ...], dtype: str) -> str | tuple[str, ...]:
    return (
        kind.replace("T", dtype)
        if isinstance(kind, str)
        else tuple(part.replace("T", dtype) for part in kind)
    )


def _disassemble(cubin: bytes) -> str:
    """The resource report and the machine code, from the tools inside Triton's wheel."""
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [cuobjdump, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _largest(found: list[Entry]) -> list[Entry]:
    return list({entry.name.split()[0]: entry for entry in found}.values())


def _is_float64(opcode: str) -> bool:
    return (
        bool(re.match(r"(DADD|DMUL|DFMA|DSETP|DMNMX|DMMA)", opcode))
        or ".F64" in opcode
        or opcode.startswith("MUFU.RCP64")
    )


def _occupancy(registers: int, shared_bytes: int, threads: int, arch: int) -> float:
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed to warps in units of 256
    blocks = min(
        REGISTERS_PER_SM // (per_warp * threads // 32),
        THREADS_PER_SM[arch] // threads,
        32 if arch in (80, 90, 100) else 24,
    )
    blocks = min(blocks, SHARED_PER_SM[arch] // (shared_bytes + 1024))  # the driver keeps 1 KiB per block
    return round(blocks * threads / THREADS_PER_SM[arch], 3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHES, default=ARCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--kernel", default="", help="only entries whose name contains this")
    parser.add_argument("--largest", action="store_true", help="only the largest size of each kernel")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    pairs = itertools.product(args.dtype, args.arch)
    jobs = [
        (entry, dtype, arch)
        for dtype, arch in pairs
        for entry in (_largest(entries(dtype, arch)) if args.largest else entries(dtype, arch))
        if args.kernel in entry.name
    ]
    if not jobs:
        names = sorted(entry.name for entry in entries(DTYPES[0], ARCHES[0]))
        parser.error(f"--kernel must be part of one of {names}, got {args.kernel!r}")
    jobs.sort(key=lambda job: (job[0].name, DTYPES.index(job[1]), job[2]))
    with ProcessPoolExecutor(max_workers=os.cpu_count(), mp_context=get_context("fork")) as pool:
        reports = list(pool.map(inspect, *zip(*jobs, strict=True)))
    if args.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
        return
    print(
        f"{'kernel':<30} {'dtype':<5} sm  {'warps':>5} {'regs':>4} {'shared':>6} {'stack':>5} {'spills':>6} "
        f"LDG.128 STG.128  MMA fp64 occupancy {'bytes/row':>9}"
    )
    for r in reports:
        print(
            f"{r.kernel:<30} {r.dtype:<5} {r.arch:<3} {r.num_warps:>5} {r.registers:>4} {r.shared_bytes:>6} "
            f"{r.stack_bytes:>5} {r.spill_instructions:>6} {r.ldg_128:>7} {r.stg_128:>7} "
            f"{r.mma_instructions:>4} {r.fp64_instructions:>4} {r.occupancy:>9.0%} {r.row_bytes:>9}"
        )


if __name__ == "__main__":
    main()
