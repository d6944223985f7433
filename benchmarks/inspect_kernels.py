"""Compiles the Triton kernels ahead of time for several GPUs, without any of them, and reads the machine
code.

    python benchmarks/inspect_kernels.py [--arch 90] [--dtype bf16] [--kernel rms_norm] [--largest] [--json]
        [--triton 3.6.0]

One line per kernel, dtype, size and architecture: registers, shared memory, spills, 16-byte accesses (bulk
tensor copies included), tensor-core instructions, float64 instructions, the share of a multiprocessor's
threads that can be resident, and the fewest bytes that a row must move (of attention: a token and head).

The second table is of the main loop (`machine_code.Code.main`): the instructions of an iteration, and among
them copies by threads (LDGSTS) and of tiles (UTMALDG), MUFU, and HGMMAs with their N. Last come the lengths
of all loops. The third says what that allows at best on an H200 (`roofline.py`), for sm_90 in 16 bits. At the
end stands what the gates found (`machine_code_gates.py`). `tests/kernels/test_machine_code.py` asserts on the
same figures.

Spills are counted as instructions (LDL, STL) and as stack: the LOCAL field of the resource report reads 0
even when a kernel spills.
"""

import argparse
import importlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import active_children, get_context

if os.environ.get("TRITON_INTERPRET") == "1":
    sys.exit("TRITON_INTERPRET must be unset or 0 to compile kernels, got 1")

import triton
import triton_wheels
from kernel_entries import Entry, entries
from machine_code import PRODUCT, Code, count, is_float64, parse, thread_bytes, widths
from machine_code_gates import COPIES, narrow_products, overwritten_operands, unordered_copies
from machine_code_tables import print_tables
from roofline import Estimate, Walk, estimate, time_before_copies
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lumi import command_line

TRITONS = ("3.6.0", "3.7.1")  # that Lumi supports
ARCHES = (80, 89, 90, 100)
DTYPES = ("fp32", "fp16", "bf16")
SHARED_LIMIT = {80: 166_912, 89: 101_376, 90: 232_448, 100: 232_448}  # bytes that one block may ask for
THREADS_PER_SM = {80: 2048, 89: 1536, 90: 2048, 100: 2048}
SHARED_PER_SM = {80: 167_936, 89: 102_400, 90: 233_472, 100: 233_472}  # bytes
REGISTERS_PER_SM = 65_536


@dataclass(frozen=True)
class Report:
    """The figures of one compilation. `occupancy` is an upper bound from registers, shared memory and
    threads; `instructions`, `ldgsts`, `utmaldg`, `mufu` and `hgmma` (N -> how many) are of the main loop."""

    triton: str
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
    loops: tuple[int, ...]
    instructions: int
    ldgsts: int
    utmaldg: int
    mufu: int
    hgmma: dict[int, int]
    narrow_products: list[str]
    unordered_copies: list[str]
    overwritten_operands: list[str]
    estimate: Estimate | None


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
    # Dynamic shared memory is not in the resource report.
    return report(entry, dtype, arch, _disassemble(compiled.asm["cubin"]), compiled.metadata.shared)


def report(entry: Entry, dtype: str, arch: int, sass: str, dynamic_shared: int) -> Report:
    """What the disassembler's output says."""
    code = parse(sass)
    resources = {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED):(\d+)", sass)}
    if resources.keys() != {"REG", "STACK", "SHARED"}:
        raise RuntimeError(f"{entry.name}: could not read the disassembler's output")
    steps, main = code.instructions, code.main
    counts = {
        "LDG.128": sum(step.is_a("LDG", "LDGSTS") and ".128" in step.opcode for step in steps)
        + count(steps, "UTMALDG"),
        "STG.128": sum(step.is_a("STG") and ".128" in step.opcode for step in steps)
        + count(steps, "UTMASTG"),
        "MMA": sum(bool(PRODUCT.match(step.opcode)) for step in steps),
        "HGMMA": count(steps, "HGMMA"),
        "UTCMMA": sum(bool(re.match(r"UTC\w*MMA", step.opcode)) for step in steps),
    }
    shared = max(resources["SHARED"], dynamic_shared)
    row_bytes = entry.moved[0] * (4 if dtype == "fp32" else 2) + entry.moved[1] * 4
    blocks = _resident_blocks(entry.num_warps, resources["REG"], shared, arch)
    return Report(
        triton=triton.__version__,
        kernel=entry.name,
        dtype=dtype,
        arch=arch,
        num_warps=entry.num_warps,
        registers=resources["REG"],
        shared_bytes=shared,
        shared_limit=SHARED_LIMIT[arch],
        stack_bytes=resources["STACK"],
        spill_instructions=count(steps, "LDL", "STL"),
        ldg_128=counts["LDG.128"],
        stg_128=counts["STG.128"],
        fp64_instructions=sum(is_float64(step) for step in steps),
        mma_instructions=counts["MMA"],
        occupancy=round(blocks * 32 * entry.num_warps / THREADS_PER_SM[arch], 3),
        row_bytes=row_bytes,
        missing=tuple(
            name
            for name in entry.expects
            if not counts[name] and not (name.endswith("MMA") and dtype == "fp32")
        ),
        loops=tuple(map(len, code.loops)),
        instructions=len(main),
        ldgsts=count(main, "LDGSTS"),
        utmaldg=count(main, "UTMALDG"),
        mufu=count(main, "MUFU"),
        hgmma=dict(widths(main)),
        narrow_products=narrow_products(code),
        unordered_copies=unordered_copies(code),
        overwritten_operands=overwritten_operands(code),
        estimate=_estimate(entry, code, row_bytes, blocks) if arch == 90 and dtype != "fp32" else None,
    )


def _estimate(entry: Entry, code: Code, row_bytes: int, blocks: int) -> Estimate:
    main = code.main
    products = [step for step in main if step.is_a("HGMMA")]
    loaded, stored = thread_bytes(main, "LDG", "LDGSTS"), thread_bytes(main, "STG")
    copies = count(main, *COPIES)
    memory_bytes = entry.covers * row_bytes
    walk = Walk(
        num_warps=entry.num_warps,
        instructions=len(main),
        mufu=count(main, "MUFU"),
        hmma=count(main, "HMMA"),
        shared_products=widths([step for step in products if not step.product_registers]),
        register_products=widths([step for step in products if step.product_registers]),
        loaded_bytes=memory_bytes * loaded / (loaded + stored) if memory_bytes else 0,
        stored_bytes=memory_bytes * stored / (loaded + stored) if memory_bytes else 0,
        cache_bytes=entry.copied * 2,
        ahead=entry.num_stages - 1 - time_before_copies(main, entry.num_warps) if copies else 0,
        in_step=count(main, "BAR") > 0,
        blocks=blocks,
    )
    return estimate(walk)


def _typed(kind: str | tuple[str, ...], dtype: str) -> str | tuple[str, ...]:
    return (
        kind.replace("T", dtype)
        if isinstance(kind, str)
        else tuple(part.replace("T", dtype) for part in kind)
    )


def _disassemble(cubin: bytes) -> str:
    """The resource report and the machine code, from the tools inside Triton's wheel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def _largest(found: list[Entry]) -> list[Entry]:
    return list({entry.name.split()[0]: entry for entry in found}.values())


def _resident_blocks(num_warps: int, registers: int, shared_bytes: int, arch: int) -> int:
    """How many blocks a multiprocessor holds at once."""
    per_warp = -(-registers * 32 // 256) * 256  # registers are handed to warps in units of 256
    return min(
        REGISTERS_PER_SM // (per_warp * num_warps),
        THREADS_PER_SM[arch] // (32 * num_warps),
        32 if arch in (80, 90, 100) else 24,
        SHARED_PER_SM[arch] // (shared_bytes + 1024),  # the driver keeps 1 KiB per block
    )


def inspect_all(jobs: list[tuple[Entry, str, int]]) -> list[Report]:
    """Inspect on all processors, with a line on stderr for each. An interruption ends it with one line."""
    reports: list[Report] = []
    # Only this process answers Ctrl-C, which the terminal sends to all.
    ignore = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("fork"), **ignore) as pool:
        try:
            for found in pool.map(inspect, *zip(*jobs, strict=True)):
                reports.append(found)
                about = f"{found.kernel}, {found.dtype}, sm_{found.arch}"
                print(f"{len(reports)} of {len(jobs)}: {about}", file=sys.stderr, flush=True)
        except KeyboardInterrupt:
            print(f"interrupted after {len(reports)} of {len(jobs)}", file=sys.stderr, flush=True)
            for worker in active_children():
                worker.kill()
            os._exit(130)  # the pool would wait for its workers, or report their end by a traceback
    return reports


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=ARCHES, default=ARCHES)
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument("--kernel", default="", help="only entries whose name contains this")
    parser.add_argument("--largest", action="store_true", help="only the largest size of each kernel")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--triton", choices=TRITONS, help="compile with this one (default: the installed)")
    args = parser.parse_args(argv)
    if args.triton not in (None, triton.__version__):
        folder = str(triton_wheels.folder(args.triton))
        if folder in sys.path:  # this process is the one that was to load it
            sys.exit(f"{folder} must hold Triton {args.triton}, got {triton.__version__}; remove that folder")
        environment = os.environ | {"PYTHONPATH": folder}
        os.execve(sys.executable, [sys.executable, *sys.argv], environment)

    known = entries(args.dtype[0], args.arch[0])  # the same names for all
    if not any(args.kernel in entry.name for entry in known):
        modules = ", ".join(sorted({entry.module.rpartition(".")[2] for entry in known}))
        parser.error(f"--kernel must be part of a kernel's name, such as {modules}; got {args.kernel!r}")
    pairs = itertools.product(args.dtype, args.arch)
    jobs = [
        (entry, dtype, arch)
        for dtype, arch in pairs
        for entry in (_largest(entries(dtype, arch)) if args.largest else entries(dtype, arch))
        if args.kernel in entry.name
    ]
    if not jobs:
        parser.error(f"--kernel must be part of the name of a largest size, got {args.kernel!r}")
    jobs.sort(key=lambda job: (job[0].name, DTYPES.index(job[1]), job[2]))
    reports = inspect_all(jobs)
    if args.json:
        print(json.dumps([asdict(report) for report in reports], indent=1))
    else:
        print(f"Triton {triton.__version__}, ptxas {triton.knobs.nvidia.ptxas.version}\n")
        print_tables(reports)
    return 0


if __name__ == "__main__":
    sys.exit(command_line.run(main))
