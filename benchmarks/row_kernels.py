"""The kernels that only move memory (RMSNorm, add + RMSNorm, SwiGLU, RoPE), against a copy of as many bytes.

    python benchmarks/row_kernels.py [--output-dir benchmarks/results]

The bytes that have to move: each input is read once and each output written once. Peers: the plain formula,
eager and compiled, and Liger-Kernel (https://github.com/linkedin/Liger-Kernel) if it is installed. Launches
bound small shapes: these are shown in a CUDA graph and from Python.
"""

import importlib.util
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import measure
import torch
from measure import Operands
from results import Results, main
from torch import Tensor

from lumi.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from lumi.kernels.rms_norm import rms_norm, rms_norm_reference
from lumi.kernels.rope import rope, rope_reference, rope_table
from lumi.kernels.swiglu import swiglu, swiglu_reference

EPS = 1e-5
PEER_SLACK = 10.0  # peers round in places of their own; what computes something else is much further away
COPY_SHARE, LIGER_BACKWARD = 0.88, 3.0  # what is aimed at

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Operator:
    """What is timed. Shapes are (rows, width), of RoPE (B, T, H, G, K).

    Per element of the first input, `elements` of the activations' dtype move, forward and backward, and
    `table` float32 of RoPE's angles.
    """

    ours: Callable
    reference: Callable
    liger: Callable
    make: Callable[[Shape, torch.dtype, torch.device], Operands]
    elements: tuple[int, int]
    large: Sequence[Shape]
    small: Sequence[Shape]


def _draw(shape: Shape, dtype: torch.dtype, device: torch.device, grad: bool = True) -> Tensor:
    return torch.randn(shape, device=device).to(dtype).requires_grad_(grad)


def _norm_operands(num_activations: int) -> Callable[[Shape, torch.dtype, torch.device], Operands]:
    def make(shape: Shape, dtype: torch.dtype, device: torch.device) -> Operands:
        activations = [_draw(shape, dtype, device) for _ in range(num_activations)]
        incoming = tuple(_draw(shape, dtype, device, grad=False) for _ in range(num_activations))
        return Operands((*activations, _draw(shape[1:], torch.float32, device)), incoming)

    return make


def _swiglu_operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> Operands:
    return Operands(
        (_draw(shape, dtype, device), _draw(shape, dtype, device)), (_draw(shape, dtype, device, grad=False),)
    )


def _rope_operands(shape: Shape, dtype: torch.dtype, device: torch.device) -> Operands:
    B, T, H, G, K = shape
    heads = ((B, T, H, K), (B, T, G, K))
    table = rope_table(torch.arange(T, device=device).expand(B, T), K, 10_000.0)
    inputs = tuple(_draw(s, dtype, device) for s in heads)
    return Operands((*inputs, *table), tuple(_draw(s, dtype, device, grad=False) for s in heads))


def _liger_rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(
        x, weight, EPS, 0.0, "llama", False
    )  # not in place: the gradient coming in is needed again


def _liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, EPS, 0.0, "llama", False)


def _liger_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    return LigerSiLUMulFunction.apply(gate, up)


def _liger_rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.rope import LigerRopeFunction

    q, k = LigerRopeFunction.apply(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2)


OPERATORS = {
    "rms_norm": Operator(
        ours=lambda x, w: rms_norm(x, w, EPS),
        reference=lambda x, w: rms_norm_reference(x, w, EPS),
        liger=_liger_rms_norm,
        make=_norm_operands(1),
        elements=(2, 3),  # x, y; dy, x, dx
        large=[(2**26 // D, D) for D in (256, 768, 1024, 2048, 4096, 8192)],
        small=[(4096, 256)],
    ),
    "add_rms_norm": Operator(
        ours=lambda x, r, w: add_rms_norm(x, r, w, EPS),
        reference=lambda x, r, w: add_rms_norm_reference(x, r, w, EPS),
        liger=_liger_add_rms_norm,
        make=_norm_operands(2),
        elements=(4, 4),  # x, residual, y, total; dy, dtotal, total, dx
        large=[(2**26 // D, D) for D in (768, 2048, 4096)],
        small=[(4096, 256)],
    ),
    "swiglu": Operator(
        ours=swiglu,
        reference=swiglu_reference,
        liger=_liger_swiglu,
        make=_swiglu_operands,
        elements=(3, 5),  # gate, up, y; dy, gate, up, dgate, dup
        large=[(2**26 // F, F) for F in (1024, 3072, 11_008)],
        small=[(4096, 1024)],
    ),
    "rope": Operator(
        ours=rope,
        reference=rope_reference,
        liger=_liger_rope,
        make=_rope_operands,
        elements=(2, 2),  # of q and k
        large=[(16, 2048, 32, 8, 64), (16, 2048, 16, 16, 128)],
        small=[(4, 1024, 4, 4, 64)],
    ),
}


def bytes_moved(name: str, shape: Shape, itemsize: int, backward: bool) -> int:
    """Forward or backward: activations, and for RoPE the half of both tables that differs."""
    elements = OPERATORS[name].elements[backward]
    if name != "rope":
        return elements * shape[0] * shape[1] * itemsize
    B, T, H, G, K = shape
    return B * T * (elements * (H + G) * K * itemsize + K * 4)


def measure_shape(
    results: Results,
    name: str,
    operator: Operator,
    shape: Shape,
    dtype: torch.dtype,
    launches: Sequence[bool],
) -> dict[str, dict[str, float]]:
    """Check and time one shape under every implementation, as a graph (True) or from Python.

    Returns seconds by direction and name, of the last launch.
    """
    device = results.device
    row_bytes = bytes_moved(name, shape, dtype.itemsize, backward=False)
    sets = measure.buffer_sets(lambda: operator.make(shape, dtype, device), row_bytes, device)
    exact = measure.results_and_gradients(operator.reference, sets[0].to(torch.float64))
    same_dtype = measure.results_and_gradients(operator.reference, sets[0])
    functions = {
        "lumi": operator.ours,
        "eager": operator.reference,
        "compiled": measure.compiled(operator.reference, device),
    }
    if device.type == "cuda" and importlib.util.find_spec("liger_kernel"):
        functions["liger"] = operator.liger
    times = {}
    for (direction, calls), graph in itertools.product(measure.DIRECTIONS.items(), launches):
        num_bytes = bytes_moved(name, shape, dtype.itemsize, backward=direction == "backward")

        def prepare(which: str, calls: Callable = calls) -> list[Callable]:
            function = functions[which]
            actual = measure.results_and_gradients(
                function, sets[0].to(device)
            )  # some peers write into their inputs: give each its own
            slack = 2.0 if which == "lumi" else PEER_SLACK
            measure.check(f"{name} {shape} {which}", actual, same_dtype, exact, slack, terms=shape[0])
            return calls(function, [operands.to(device) for operands in sets])

        def copy(num_bytes: int = num_bytes) -> list[Callable]:
            sources = [
                torch.randint(0, 256, (num_bytes // 2,), dtype=torch.uint8, device=device) for _ in sets
            ]
            return [source.clone for source in sources]

        candidates = {**{which: partial(prepare, which) for which in functions}, "copy": copy}
        text = f"{name} {direction} {'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"
        times[direction] = results.time(text, candidates, graph=graph, num_bytes=num_bytes)
    return times


def run(
    results: Results, operators: Mapping[str, Operator] = OPERATORS, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Every operator at every shape."""
    for name, operator in operators.items():
        shares: dict[str, list[float]] = {direction: [] for direction in measure.DIRECTIONS}
        over_liger = []
        for shape in operator.large:
            torch.compiler.reset()
            with results.case(f"{name} {shape}"):
                for direction, times in measure_shape(results, name, operator, shape, dtype, [True]).items():
                    shares[direction].append(times["copy"] / times["lumi"])
                    if direction == "backward" and shape[-1] <= 2048 and "liger" in times:
                        over_liger.append(times["liger"] / times["lumi"])
        for direction, values in shares.items():
            over = f"at least over {len(operator.large)} shapes"
            text = f"{name} {direction}: share of the copy's bandwidth, {over}"
            results.claim(
                text, min(values) if len(values) == len(operator.large) else None, at_least=COPY_SHARE
            )
        if name == "rms_norm":
            text = "rms_norm backward: times as fast as Liger, at least over hidden sizes up to 2048"
            results.claim(text, min(over_liger, default=None), at_least=LIGER_BACKWARD)
        for shape in operator.small:
            torch.compiler.reset()
            with results.case(f"{name} {shape}, launch-bound"):
                measure_shape(results, name, operator, shape, dtype, [True, False])


if __name__ == "__main__":
    sys.exit(main("row_kernels", __doc__, run))
