"""The tables of `inspect_kernels.py`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from machine_code_gates import GATES
from roofline import backward_of_products

if TYPE_CHECKING:
    from inspect_kernels import Report

# What README.md aims at, by the beginning of a kernel's name; the first that fits holds.
AIMS = {
    "attention_fwd K=64": "1.25 x SDPA",
    "attention_fwd": "1.35 x SDPA",
    "attention_d": "1.1 x SDPA, fwd + bwd",
    "linear_cross_entropy": "85% of the products' floor",
    "rms_norm_bwd": "88% of a copy, 3 x Liger",
    "rms_norm": "88% of a copy",
    "add_rms_norm": "88% of a copy",
    "swiglu": "88% of a copy",
    "rope": "88% of a copy",
}


def print_tables(reports: list[Report]) -> None:
    """What the machine code holds, what it allows at best, and what the gates found."""
    _print_code(reports)
    _print_loops(reports)
    _print_estimates([report for report in reports if report.estimate])
    found = [
        f"{_name(report)} {len(lines)} {gate.replace('_', ' ')}, such as {lines[0]}"
        for report in reports
        for gate in GATES
        if (lines := getattr(report, gate))
    ]
    print("\nThe gates found", "\n".join([f"{len(found)} faults:", *found]) if found else "nothing.")


def _name(report: Report) -> str:
    return f"{report.kernel:<30} {report.dtype:<5} {report.arch:<3}"


def _print_code(reports: list[Report]) -> None:
    print(
        f"{'kernel':<30} {'dtype':<5} sm  {'warps':>5} {'regs':>4} {'shared':>6} {'stack':>5} {'spills':>6} "
        f"LDG.128 STG.128  MMA fp64 occupancy {'bytes/row':>9}"
    )
    for r in reports:
        print(
            f"{_name(r)} {r.num_warps:>5} {r.registers:>4} {r.shared_bytes:>6} "
            f"{r.stack_bytes:>5} {r.spill_instructions:>6} {r.ldg_128:>7} {r.stg_128:>7} "
            f"{r.mma_instructions:>4} {r.fp64_instructions:>4} {r.occupancy:>9.0%} {r.row_bytes:>9}"
        )


def _print_loops(reports: list[Report]) -> None:
    print(f"\n{'main loop':<30} {'dtype':<5} sm  instructions LDGSTS UTMALDG MUFU  {'HGMMA':<17} all loops")
    for r in reports:
        hgmma = " ".join(f"{number} n{N}" for N, number in r.hgmma.items())
        loops = " + ".join(map(str, r.loops)) or "none"
        print(
            f"{_name(r)} {r.instructions:>12} {r.ldgsts:>6} {r.utmaldg:>7} {r.mufu:>4}  {hgmma:<17} {loops}"
        )


def _print_estimates(reports: list[Report]) -> None:
    if not reports:
        return
    print(
        f"\n{'at best, clocks on an H200':<30} {'dtype':<5} sm  products  MUFU issue memory alone  "
        "binds    of peak of 4.8 TB/s  aim"
    )
    for r in reports:
        e = r.estimate
        products, memory = (f"{share:.0%}" if share else "" for share in (e.of_products, e.of_memory))
        aim = next((text for name, text in AIMS.items() if r.kernel.startswith(name)), "")
        print(
            f"{_name(r)} {e.products:>8.0f} {e.mufu:>5.0f} {e.issue:>5.0f} {e.memory:>6.0f} {e.alone:>5.0f}  "
            f"{e.binds:<8} {products:>7} {memory:>11}  {aim}".rstrip()
        )
    found = {(r.kernel, r.dtype): r for r in reports}
    for (kernel, dtype), dkdv in found.items():
        dq = found.get((kernel.replace("_dkdv", "_dq"), dtype), dkdv)
        if dq is not dkdv:
            share = backward_of_products(dkdv.estimate.of_products, dq.estimate.of_products)
            print(
                f"{kernel.replace('_dkdv', '_bwd'):<30} {dtype:<5} 90 {share:>51.0%}: 5 of 7 products count"
            )
