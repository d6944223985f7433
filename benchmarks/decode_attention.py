"""Attention of one new token per row against its key-value cache: bytes per second, against torch's SDPA.

    python benchmarks/decode_attention.py [--output-dir benchmarks/results]

All rows are at the end of their cache, so SDPA needs no mask. "sdpa masked" is the general case: each row has
its own position. "paged" is Lumi on pages of 64 slots in random order.
"""

import sys
from collections.abc import Callable, Sequence

import measure
import torch
import torch.nn.functional as F
from measure import Operands
from results import Results, main
from torch import Tensor

from lumi.kernels.decode_attention import decode_attention, decode_attention_reference

Shape = tuple[int, int, int, int, int]  # B, S, H, G, K
SHAPES: Sequence[Shape] = [(B, S, 32, 8, 128) for B in (1, 8, 64) for S in (1024, 4096, 32_768)] + [
    (8, 4096, 32, 8, 64),
    (8, 4096, 12, 12, 64),
]
SMALL: Sequence[Shape] = [(1, 1024, 32, 8, 128), (8, 1024, 12, 12, 64)]
PAGE_SIZE = 64
LARGE_BYTES = 64 * 2**20
PEER_SLACK = 10.0
MASKED_BYTES = 2**30  # with a mask torch repeats keys and values for every query head


def _cache_bytes(shape: Shape, dtype: torch.dtype) -> int:
    B, S, _, G, K = shape
    return 2 * B * S * G * K * dtype.itemsize


def _sdpa(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k_cache, v_cache))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def measure_shape(results: Results, shape: Shape, dtype: torch.dtype, *, graph: bool) -> dict[str, float]:
    """Check and time one shape; seconds by name."""
    device, (B, S, H, G, K) = results.device, shape
    num_bytes = _cache_bytes(shape, dtype)
    positions = torch.full((B, 1), S - 1, device=device)
    draw = lambda *size: torch.randn(size, device=device).to(dtype)
    sets = measure.buffer_sets(
        lambda: Operands((draw(B, 1, H, K), draw(B, S, G, K), draw(B, S, G, K)), ()), num_bytes, device
    )
    order = torch.randperm(B * S // PAGE_SIZE, device=device)
    page_table = order.argsort().to(torch.int32).view(B, -1)  # where each page went

    def paged(operands: Operands) -> Operands:
        q, *caches = operands.inputs
        return Operands((q, *(cache.view(-1, PAGE_SIZE, G, K)[order] for cache in caches)), ())

    last = Operands(tuple(t[-1:] for t in sets[0].inputs), ())  # float64 of all rows would not fit
    reference = lambda q, k, v: decode_attention_reference(q, k, v, positions[-1:])
    exact, same_dtype = (
        measure.results_and_gradients(reference, operands) for operands in (last.to(torch.float64), last)
    )

    def candidate(
        function: Callable, slack: float, arrange: Callable[[Operands], Operands] = lambda operands: operands
    ) -> Callable[[], list[Callable]]:
        def prepare() -> list[Callable]:
            arranged = [arrange(operands) for operands in sets]
            (y,) = measure.results_and_gradients(function, arranged[0])
            if not y.isfinite().all():
                raise RuntimeError(f"decode_attention {shape}: not all results are finite")
            measure.check(f"decode_attention {shape}", [y[-1:]], same_dtype, exact, slack)
            return measure.forward_calls(function, arranged)

        return prepare

    candidates = {
        "lumi": candidate(lambda q, k, v: decode_attention(q, k, v, positions), 2.0),
        "lumi paged": candidate(lambda q, k, v: decode_attention(q, k, v, positions, page_table), 2.0, paged),
        "sdpa": candidate(_sdpa, PEER_SLACK),
        "copy": lambda: [draw(num_bytes // (2 * dtype.itemsize)).clone for _ in sets],
    }
    if num_bytes <= MASKED_BYTES:
        candidates["sdpa masked"] = candidate(
            lambda q, k, v: decode_attention_reference(q, k, v, positions), PEER_SLACK
        )
    return results.time(f"decode B{B} S{S} H{H} G{G} K{K}", candidates, graph=graph, num_bytes=num_bytes)


@torch.no_grad()
def run(
    results: Results,
    shapes: Sequence[Shape] = SHAPES,
    small: Sequence[Shape] = SMALL,
    dtype: torch.dtype = torch.bfloat16,
) -> None:
    """All shapes in a graph, the small ones from Python as well."""
    over_sdpa, shares = [], []
    large = [shape for shape in shapes if _cache_bytes(shape, dtype) >= LARGE_BYTES]
    for shape in shapes:
        with results.case(f"decode_attention {shape}"):
            times = measure_shape(results, shape, dtype, graph=True)
            over_sdpa += [times["sdpa"] / times["lumi"]] if "sdpa" in times else []
            if shape in large:
                shares.append(times["copy"] / times["lumi"])
    for shape in small:
        with results.case(f"decode_attention {shape}, launch-bound"):
            measure_shape(results, shape, dtype, graph=False)
    for text, values, count in (
        ("times as fast as SDPA, at least over all shapes", over_sdpa, len(shapes)),
        ("share of the copy's bandwidth, at least over caches from 64 MiB on", shares, len(large)),
    ):
        results.claim(f"decode attention: {text}", min(values) if values and len(values) == count else None)


if __name__ == "__main__":
    sys.exit(main("decode_attention", __doc__, run))
