"""The C++ global norm against torch's, on the CPU: milliseconds and GB/s, the best of many runs.

python benchmarks/global_norm.py [--threads 2]
"""

import argparse
import time
from collections.abc import Callable

import torch
from torch import Tensor

from lumi.kernels.global_norm import global_norm, global_norm_reference

CASES = {
    "a small model (100 tensors, 9 M)": [(256, 256)] * 60
    + [(1024, 256)] * 12
    + [(8192, 256)]
    + [(256,)] * 27,
    "one large tensor (64 M)": [(8192, 8192)],
    "many tiny tensors (2,000 of 256)": [(256,)] * 2000,
}


def best_seconds(function: Callable[[list[Tensor]], object], tensors: list[Tensor]) -> float:
    """The fastest of the runs that fit into a second, at least five."""
    function(tensors)
    best, start, runs = float("inf"), time.perf_counter(), 0
    while runs < 5 or time.perf_counter() - start < 1.0:
        before = time.perf_counter()
        function(tensors)
        best = min(best, time.perf_counter() - before)
        runs += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    torch.set_num_threads(parser.parse_args().threads)
    functions = {
        "lumi C++ (float64 sums)": global_norm,
        "lumi reference (float64 sums)": global_norm_reference,
        "torch get_total_norm (float32)": torch.nn.utils.get_total_norm,
    }
    for case, shapes in CASES.items():
        torch.manual_seed(0)
        tensors = [torch.randn(shape) for shape in shapes]
        exact = global_norm_reference(tensors).item()
        num_bytes = 4 * sum(tensor.numel() for tensor in tensors)
        print(f"{case}, {torch.get_num_threads()} threads")
        for name, function in functions.items():
            seconds = best_seconds(function, tensors)
            error = abs(float(function(tensors)) - exact) / exact  # type: ignore[arg-type]
            print(
                f"  {name:<32} {seconds * 1e3:8.3f} ms  {num_bytes / seconds / 1e9:6.1f} GB/s"
                f"  relative error {error:.0e}"
            )


if __name__ == "__main__":
    main()
