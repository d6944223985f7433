"""Linears with low-rank adapters against the frozen product alone.

    python benchmarks/lora_linear.py [--output-dir benchmarks/results]

"base" is the work without adapters: the products with the frozen matrices, and a backward with respect to x
only. "plain" is the formula as written, "compiled" the same compiled.
"""

import itertools
import sys
from collections.abc import Callable, Sequence
from functools import partial

import measure
import torch
import torch.nn.functional as F
from measure import Operands
from results import Results, main
from torch import Tensor

from lumi.kernels.lora_linear import lora_linear, lora_linear_reference

Shape = tuple[int, int, int, int]  # N rows, D features in and out, linears of one input, rank
SHAPES: Sequence[Shape] = [
    (8192, 4096, 3, 16),
    (8192, 4096, 1, 16),
    (16_384, 2048, 3, 16),
    (16_384, 768, 3, 16),
]
SMALL: Shape = (4096, 256, 3, 16)
OVER_BASE = 1.10  # what is aimed at, at most
SCALE = 2.0
PEER_SLACK = 10.0


def measure_shape(
    results: Results, shape: Shape, dtype: torch.dtype, launches: Sequence[bool]
) -> dict[str, dict[str, float]]:
    """Check and time one shape, as a graph (True) or from Python.

    Returns seconds by direction and name, of the last launch.
    """
    device, (N, D, count, rank) = results.device, shape
    draw = lambda *size: torch.randn(size, device=device)
    weights = [(draw(D, D) / D**0.5).to(dtype) for _ in range(count)]
    scales = [SCALE] * count

    def operands() -> Operands:
        adapters = [draw(rank, D) / D**0.5 for _ in range(count)] + [draw(D, rank) / 4 for _ in range(count)]
        inputs = (draw(N, D).to(dtype), *adapters)
        return Operands(
            tuple(t.requires_grad_() for t in inputs), tuple(draw(N, D).to(dtype) for _ in range(count))
        )

    def adapted(function: Callable, own: Sequence[Tensor] = weights) -> Callable:
        return lambda x, *adapters: function(x, own, adapters[:count], adapters[count:], scales)

    sets = measure.buffer_sets(operands, (1 + count) * N * D * dtype.itemsize, device)
    plain = adapted(lora_linear_reference)
    exact = measure.results_and_gradients(
        adapted(lora_linear_reference, [w.double() for w in weights]), sets[0].to(torch.float64)
    )
    same_dtype = measure.results_and_gradients(plain, sets[0])
    base_sets = [Operands(operands.inputs[:1], operands.incoming) for operands in sets]
    base = lambda x: [F.linear(x, weight) for weight in weights]
    functions = {"lumi": adapted(lora_linear), "plain": plain, "compiled": measure.compiled(plain, device)}
    times = {}
    for (direction, calls), graph in itertools.product(measure.DIRECTIONS.items(), launches):

        def prepare(name: str, calls: Callable = calls) -> list[Callable]:
            actual = measure.results_and_gradients(functions[name], sets[0])
            measure.check(
                f"lora_linear {shape} {name}",
                actual,
                same_dtype,
                exact,
                2.0 if name == "lumi" else PEER_SLACK,
            )
            return calls(functions[name], sets)

        candidates = {
            **{name: partial(prepare, name) for name in functions},
            "base": partial(calls, base, base_sets),
        }
        text = f"lora_linear {direction} N{N} D{D} x{count} R{rank}"
        times[direction] = results.time(text, candidates, graph=graph, flops=2 * N * D * D * count)
    return times


def run(
    results: Results,
    shapes: Sequence[Shape] = SHAPES,
    small: Shape = SMALL,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """All shapes in both directions; the smallest from Python as well."""
    ratios: dict[str, list[float]] = {direction: [] for direction in measure.DIRECTIONS}
    for shape in shapes:
        torch.compiler.reset()
        with results.case(f"lora_linear {shape}"):
            for direction, times in measure_shape(results, shape, dtype, [True]).items():
                ratios[direction].append(times["lumi"] / times["base"])
    for direction, values in ratios.items():
        text = f"lora_linear {direction}: time over the frozen product's, at most over {len(shapes)} shapes"
        results.claim(text, max(values) if len(values) == len(shapes) else None, at_most=OVER_BASE)
    torch.compiler.reset()
    with results.case(f"lora_linear {small}, launch-bound"):
        measure_shape(results, small, dtype, [True, False])


if __name__ == "__main__":
    sys.exit(main("lora_linear", __doc__, run))
