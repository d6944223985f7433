"""The output projection with its loss, forward and backward, against the floor of its three matrix products.

    python benchmarks/linear_cross_entropy.py [--output-dir benchmarks/results]

The floor is 6 N D V FLOPs at the rate that torch's own product of two 8192 x 8192 matrices reaches on this
device.
Peers: torch with whole logits, eager and compiled; Liger-Kernel if it is installed. Peak memory is what a
call allocates beyond its inputs, gradients included.
"""

import importlib.util
import sys
from collections.abc import Callable, Sequence

import measure
import torch
import torch.nn.functional as F
from measure import Operands
from results import Results, main
from torch import Tensor

from lumi.kernels.chunked_cross_entropy import chunked_cross_entropy
from lumi.kernels.linear_cross_entropy import IGNORE_INDEX, linear_cross_entropy, workspace_bytes

Shape = tuple[int, int, int]  # N, D, V
TARGET: Shape = (4096, 4096, 128_256)
SHAPES: Sequence[Shape] = [TARGET, (16_384, 256, 32_768), (32_768, 768, 50_304)]
OVER_LIGER, SHARE_OF_FLOOR = 4.0, 0.85  # what is aimed at
PEER_SLACK = 10.0


def measure_shape(
    results: Results, shape: Shape, weight_dtype: torch.dtype, dtype: torch.dtype
) -> dict[str, float]:
    """Check and time one shape, and take the peak memory of each candidate; seconds by name."""
    device, (N, D, V) = results.device, shape
    targets_N = torch.randint(0, V, (N,), device=device)
    targets_N[::97] = IGNORE_INDEX

    def operands() -> Operands:
        hidden_ND, weight_VD = (
            torch.randn(N, D, device=device).to(dtype),
            (torch.randn(V, D, device=device) / D**0.5).to(weight_dtype),
        )
        return Operands(
            (hidden_ND.requires_grad_(), weight_VD.requires_grad_()), (torch.ones((), device=device),)
        )

    def plain(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        logits_NV = F.linear(hidden_ND, weight_VD.to(hidden_ND.dtype)).float()
        return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")

    def liger(hidden_ND: Tensor, weight_VD: Tensor) -> Tensor:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

        arguments = (hidden_ND, weight_VD, targets_N, None, None, IGNORE_INDEX, 0.0, 0.0, "sum")
        return LigerFusedLinearCrossEntropyFunction.apply(*arguments)[0]

    sets = [operands() for _ in range(2)]
    # Not the definition: its whole logits would not fit in float64.
    reference = lambda hidden_ND, weight_VD: chunked_cross_entropy(hidden_ND, weight_VD, targets_N)
    exact = measure.results_and_gradients(reference, sets[0].to(torch.float64))
    same_dtype = measure.results_and_gradients(reference, sets[0])
    text = f"linear_cross_entropy N{N} D{D} V{V}, {str(weight_dtype).removeprefix('torch.')} weight"
    peaks = {}

    def candidate(name: str, function: Callable, slack: float) -> Callable[[], list[Callable]]:
        def prepare() -> list[Callable]:
            actual = measure.results_and_gradients(function, sets[0])
            measure.check(text, actual, [same_dtype[0].to(actual[0].dtype), *same_dtype[1:]], exact, slack, N)
            del actual
            calls = measure.step_calls(function, sets)
            peaks[name] = measure.peak_bytes(calls[0], device)
            return calls

        return prepare

    candidates = {
        "lumi": candidate("lumi", lambda h, w: linear_cross_entropy(h, w, targets_N), 2.0),
        "eager": candidate("eager", plain, PEER_SLACK),
    }
    if weight_dtype == dtype:
        candidates["compiled"] = candidate("compiled", measure.compiled(plain, device), PEER_SLACK)
    if weight_dtype == dtype and device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        candidates["liger"] = candidate("liger", liger, PEER_SLACK)
    times = results.time(text, candidates, graph=False, flops=6 * N * D * V)
    bound = workspace_bytes(N, D, V, dtype, weight_dtype)
    results.note(**{f"{text}: peak bytes": {**peaks, "lumi's bound": bound}})
    return times


def run(
    results: Results,
    shapes: Sequence[Shape] = SHAPES,
    dtype: torch.dtype = torch.bfloat16,
    matmul_size: int = 8192,
) -> None:
    """Every shape, the weight in the dtype of the hidden states and as a float32 master."""
    rate = results.matmul_rate(matmul_size)
    for shape in shapes:
        for weight_dtype in (dtype, torch.float32):
            torch.compiler.reset()
            with results.case(f"linear_cross_entropy {shape}, {weight_dtype}"):
                times = measure_shape(results, shape, weight_dtype, dtype)
                wanted = shape == TARGET and weight_dtype == dtype
                N, D, V = shape
                floor = 6 * N * D * V / rate
                text = (
                    f"linear cross-entropy N{N} D{D} V{V}, {str(weight_dtype).removeprefix('torch.')} weight"
                )
                results.claim(
                    f"{text}: share of the floor",
                    floor / times["lumi"],
                    at_least=SHARE_OF_FLOOR if wanted else None,
                )
                if weight_dtype == dtype:  # Liger takes no other
                    over_liger = measure.ratio(times, "liger")
                    results.claim(
                        f"{text}: times as fast as Liger", over_liger, at_least=OVER_LIGER if wanted else None
                    )


if __name__ == "__main__":
    sys.exit(main("linear_cross_entropy", __doc__, run))
