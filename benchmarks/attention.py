"""Attention, forward and backward: causal rows and packed documents, against the best of others.

    python benchmarks/attention.py [--output-dir benchmarks/results]

TFLOP/s count visible pairs: 4 K FLOPs per pair and head forward, 10 K backward. Peers:

- `scaled_dot_product_attention`, as torch chooses and by cuDNN, on the same strided tensors as Lumi (causal
  rows)
- FlexAttention (Dong et al. 2024, https://arxiv.org/abs/2412.05496), compiled. Its block mask is made outside
  the timed region, as Lumi's plan is
- `varlen_attn`, if torch has it (packed documents)
"""

import importlib.util
import inspect
import itertools
import random
import sys
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import measure
import torch
import torch.nn.functional as F
from measure import Operands
from results import Results, main
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lumi.kernels.attention import attention, attention_reference
from lumi.kernels.attention_plan import MaskPlan, attention_plan

Shape = tuple[int, int, int, int, int]  # B, T, H, G, K

CAUSAL: Sequence[Shape] = [
    (8, 2048, 32, 32, 64),
    (2, 8192, 32, 32, 64),
    (8, 2048, 16, 16, 128),
    (2, 8192, 16, 16, 128),
]
GROUPED: Sequence[Shape] = [(4, 4096, 32, 8, 128)]
PACKED: Sequence[Shape] = [(2, 8192, 32, 32, 64), (2, 8192, 16, 16, 128)]
FORWARD_OVER_SDPA, BACKWARD_OVER_SDPA, PACKED_OVER_FLEX = {64: 1.25, 128: 1.35}, 1.1, 1.1  # what is aimed at
PEER_SLACK = 10.0


def document_lengths(length: int, mean: int, generator: random.Random) -> list[int]:
    """Lengths of documents that fill a row: exponential, so many short ones and a few long ones."""
    lengths: list[int] = []
    while (left := length - sum(lengths)) > 0:
        lengths.append(min(1 + int(generator.expovariate(1 / mean)), left))
    return lengths


def check(name: str, function: Callable, operands: Operands, seen_BTT: Tensor, slack: float) -> None:
    """Compare the last row and kv head with float64; the scores of all heads would not fit."""
    group = operands.inputs[0].shape[2] // operands.inputs[1].shape[2]
    pick = lambda t_BTHK, heads: t_BTHK.detach()[-1:, :, -heads:]
    widths = (group, 1, 1)
    part = Operands(
        tuple(pick(t, w).requires_grad_() for t, w in zip(operands.inputs, widths, strict=True)),
        (pick(operands.incoming[0], group),),
    )
    plan = MaskPlan(batch=1, length=seen_BTT.shape[1], mask=seen_BTT[-1:, None])
    reference = lambda q, k, v: attention_reference(q, k, v, plan)
    exact, same_dtype = (measure.results_and_gradients(reference, p) for p in (part.to(torch.float64), part))
    whole = measure.results_and_gradients(function, operands)
    actual = [pick(t, w) for t, w in zip(whole, (group, *widths), strict=True)]
    if any(not t.isfinite().all() for t in whole):
        raise RuntimeError(f"{name}: not all results are finite")
    measure.check(name, actual, same_dtype, exact, slack)


def _sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return _sdpa(q, k, v)


def _flex(shape: Shape, document_BT: Tensor, device: torch.device) -> Callable:
    """FlexAttention under the documents' mask. Whole rows have one document number throughout."""
    B, T, H, G, _ = shape
    whole = not document_BT.any()
    documents = lambda b, h, t, s: (document_BT[b, t] == document_BT[b, s]) & (t >= s)
    mask = create_block_mask(
        (lambda b, h, t, s: t >= s) if whole else documents, None if whole else B, None, T, T, device=device
    )
    call = measure.compiled(flex_attention, device)
    return lambda q, k, v: call(
        *(t.transpose(1, 2) for t in (q, k, v)), block_mask=mask, enable_gqa=H != G
    ).transpose(1, 2)


def _varlen(cu_seqlens: Tensor) -> Callable:
    from torch.nn.attention.varlen import varlen_attn

    longest = int(cu_seqlens.diff().max())
    causal: dict[str, Any] = (
        {"is_causal": True}
        if "is_causal" in inspect.signature(varlen_attn).parameters
        else {"window_size": (-1, 0)}
    )

    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (t.flatten(0, 1) for t in (q, k, v))
        return varlen_attn(*flat, cu_seqlens, cu_seqlens, longest, longest, **causal).view(q.shape)

    return call


def measure_shape(
    results: Results, shape: Shape, dtype: torch.dtype, mean_length: int | None
) -> dict[str, dict[str, float]]:
    """Check and time one shape; returns seconds by direction and name.

    `mean_length` is that of the documents, in tokens; None: whole rows.
    """
    device, (B, T, H, G, K) = results.device, shape
    generator = random.Random(0)
    lengths = [[T] if mean_length is None else document_lengths(T, mean_length, generator) for _ in range(B)]
    flat = list(itertools.chain.from_iterable(lengths))
    cu_seqlens = torch.tensor([0, *itertools.accumulate(flat)], dtype=torch.int32)
    document_BT = torch.stack(
        [torch.repeat_interleave(torch.arange(len(row)), torch.tensor(row)) for row in lengths]
    ).to(device)
    seen_BTT = (document_BT[:, :, None] == document_BT[:, None, :]) & torch.ones(
        T, T, dtype=torch.bool, device=device
    ).tril()
    pairs = sum(length * (length + 1) // 2 for length in flat)

    def operands() -> Operands:
        draw = lambda heads: torch.randn(B, T, heads, K, device=device).to(dtype)
        return Operands(tuple(draw(heads).requires_grad_() for heads in (H, G, G)), (draw(H),))

    sets = measure.buffer_sets(operands, 4 * B * T * H * K * dtype.itemsize, device)
    plan = attention_plan(None if mean_length is None else cu_seqlens, B, T, device)
    functions: dict[str, Callable[[], Callable]] = {"lumi": lambda: lambda q, k, v: attention(q, k, v, plan)}
    functions["flex"] = lambda: _flex(shape, document_BT, device)
    if mean_length is None:
        functions |= {"sdpa": lambda: _sdpa, "sdpa cudnn": lambda: _cudnn}
    elif importlib.util.find_spec("torch.nn.attention.varlen"):
        functions["varlen"] = lambda: _varlen(cu_seqlens.to(device))
    functions = {name: cache(make) for name, make in functions.items()}  # compiled once for both directions
    times = {}
    for direction, calls in measure.DIRECTIONS.items():
        text = f"{'causal' if mean_length is None else 'packed'} {direction} B{B} T{T} H{H} G{G} K{K}"

        def prepare(name: str, calls: Callable = calls, text: str = text) -> list[Callable]:
            function = functions[name]()
            check(f"{text} {name}", function, sets[0], seen_BTT, 2.0 if name == "lumi" else PEER_SLACK)
            return calls(function, sets)

        candidates = {name: partial(prepare, name) for name in functions}
        times[direction] = results.time(
            text, candidates, flops=(4 if direction == "forward" else 10) * pairs * H * K
        )
    return times


def run(
    results: Results,
    causal: Sequence[Shape] = (*CAUSAL, *GROUPED),
    packed: Sequence[Shape] = PACKED,
    dtype=torch.bfloat16,
) -> None:
    """All shapes. A claim is the smallest of the ratios, over shapes with as many query heads as kv heads."""
    for shapes, mean_length in ((causal, None), (packed, 512)):
        ratios: dict[tuple[str, int, str], list[float]] = {}
        for shape in shapes:
            torch.compiler.reset()
            with results.case(f"{shape}, documents of {mean_length} tokens"):
                for direction, times in measure_shape(results, shape, dtype, mean_length).items():
                    for peer in times.keys() - {"lumi"} if shape[2] == shape[3] else ():
                        ratios.setdefault((direction, shape[4], peer), []).append(times[peer] / times["lumi"])
        kind = "attention" if mean_length is None else "packed documents"
        widths = [K for _, _, H, G, K in shapes if H == G]
        wanted = {
            (*key, peer) for key in itertools.product(measure.DIRECTIONS, widths) for peer in ("flex", "sdpa")
        }
        for direction, K, peer in sorted(wanted | ratios.keys()):
            target, values = (
                _target(mean_length is not None, direction, K, peer),
                ratios.get((direction, K, peer), []),
            )
            if values or target:
                over = f"at least over {widths.count(K)} shapes"
                text = f"{kind} {direction}, head_dim {K}: times as fast as {peer}, {over}"
                results.claim(text, min(values) if len(values) == widths.count(K) else None, at_least=target)


def _target(packed: bool, direction: str, K: int, peer: str) -> float | None:
    if packed:
        return PACKED_OVER_FLEX if peer == "flex" else None
    if peer != "sdpa":
        return None
    return FORWARD_OVER_SDPA.get(K) if direction == "forward" else BACKWARD_OVER_SDPA


if __name__ == "__main__":
    sys.exit(main("attention", __doc__, run))
