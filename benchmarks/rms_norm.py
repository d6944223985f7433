"""RMSNorm on a GPU: correctness first, then Triton against torch, eager and compiled, forward and backward.

    python benchmarks/rms_norm.py [--output-dir benchmarks/results]

Each figure is GB/s of the bytes that have to move (forward: x in, y out; backward: dy and x in, dx out), beside what a copy of the same
bytes reaches on this device, which is the floor that any kernel can hope for. Median of the runs, L2 cache flushed before each. Writes
rms_norm-<device>.json.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from lumi.kernels.rms_norm import rms_norm, rms_norm_reference

SHAPES = [(8192, 64), (262_144, 64), (512, 768), (16_384, 768), (16_384, 2048), (8192, 4096), (4096, 8192), (2048, 16_384)]
EPS = 1e-5


def median_seconds(function: Callable[[], object], flush: Tensor, runs: int = 50) -> float:
    """Median device time of one call, with a cold L2 cache."""
    for _ in range(5):
        function()
    times = []
    for _ in range(runs):
        flush.zero_()
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def check(x_ND: Tensor, weight_D: Tensor, dy_ND: Tensor) -> None:
    """Forward and both gradients at most twice as far from float64 as torch in the same dtype, plus one ulp."""

    def run(function: Callable, *tensors: Tensor) -> tuple[Tensor, ...]:
        x, weight, dy = tensors
        x, weight = x.detach().requires_grad_(), weight.detach().requires_grad_()
        y = function(x, weight, EPS)
        return y, *torch.autograd.grad(y, (x, weight), dy)

    exact = run(rms_norm_reference, x_ND.double(), weight_D.double(), dy_ND.double())
    same_dtype = run(rms_norm_reference, x_ND, weight_D, dy_ND)
    for name, actual, same, truth in zip(("y", "dx", "dweight"), run(rms_norm, x_ND, weight_D, dy_ND), same_dtype, exact, strict=True):
        error = (actual.double() - truth).abs().max()
        budget = 2 * (same.double() - truth).abs().max() + torch.finfo(actual.dtype).eps * truth.abs().max()
        if not error <= budget:
            sys.exit(f"{name} at {tuple(x_ND.shape)} {x_ND.dtype}: error {error:.3e} exceeds {budget:.3e}; nothing was timed")


def measure(N: int, D: int, dtype: torch.dtype, flush: Tensor) -> list[dict]:
    """Check, then time one shape under every implementation."""
    x_ND, dy_ND = (torch.randn(N, D, device="cuda", dtype=dtype) for _ in range(2))
    weight_D = torch.randn(D, device="cuda")
    check(x_ND[:512], weight_D, dy_ND[:512])
    row_bytes = x_ND.numel() * x_ND.element_size()
    copy = torch.empty_like(x_ND)
    floor = 2 * row_bytes / median_seconds(lambda: copy.copy_(x_ND), flush) / 1e9

    results = []
    implementations = {"triton": rms_norm, "eager": rms_norm_reference, "compiled": torch.compile(rms_norm_reference, dynamic=False)}
    for name, function in implementations.items():
        x, weight = x_ND.detach().requires_grad_(), weight_D.detach().requires_grad_()
        y = function(x, weight, EPS)
        forward = median_seconds(lambda f=function: f(x_ND, weight_D, EPS), flush)
        backward = median_seconds(lambda y=y, x=x, weight=weight: torch.autograd.grad(y, (x, weight), dy_ND, retain_graph=True), flush)
        for direction, seconds, num_bytes in (("forward", forward, 2 * row_bytes), ("backward", backward, 3 * row_bytes)):
            results.append(
                {
                    "implementation": name,
                    "direction": direction,
                    "rows": N,
                    "dim": D,
                    "dtype": str(dtype).removeprefix("torch."),
                    "microseconds": round(seconds * 1e6, 2),
                    "gb_per_second": round(num_bytes / seconds / 1e9, 1),
                    "copy_gb_per_second": round(floor, 1),
                }
            )
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/rms_norm.py needs a CUDA device, and there is none here", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device_name = torch.cuda.get_device_name()
    flush = torch.empty(256 * 2**20, dtype=torch.uint8, device="cuda")
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for N, D in SHAPES:
            torch.compiler.reset()
            results += measure(N, D, dtype, flush)
            for r in results[-6:]:
                print(
                    f"{r['rows']:>7} x {r['dim']:<6} {r['dtype']:<9} {r['direction']:<9} {r['implementation']:<9} "
                    f"{r['microseconds']:>9.1f} us {r['gb_per_second']:>7.0f} GB/s  (copy: {r['copy_gb_per_second']:.0f})"
                )
    args.output_dir.mkdir(parents=True, exist_ok=True)
    path = args.output_dir / f"rms_norm-{device_name.replace(' ', '_').replace('/', '_')}.json"
    path.write_text(json.dumps({"device": device_name, "torch": torch.__version__, "results": results}, indent=1) + "\n")
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
