"""Causal attention over packed documents, with grouped-query heads and an optional sliding window.

    y_t = sum over s of p_ts v_s,   p_t = softmax_s(q_t . k_s / sqrt(K)),   first_key_t <= s <= t

    dv_s = sum_t p_ts dy_t        dz_ts = p_ts (dy_t . v_s - delta_t),   delta_t = dy_t . y_t
    dq_t = sum_s dz_ts k_s / sqrt(K)        dk_s = sum_t dz_ts q_t / sqrt(K)

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; without whole rows of scores: Dao 2023,
https://arxiv.org/abs/2307.08691; grouped queries: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.

Shape letters: B batch rows, T tokens per row, N = B*T tokens, H query heads, G kv heads (H a multiple of G),
K head dim, L = N padded to whole tiles of ORDER_BLOCK tokens. Query head h reads kv head h // (H / G).
Precision: products in the dtype of q, summed in float32. Softmax in float32 and in powers of two: log2 e is
folded into the scale. p and dz are rounded to the dtype of q for the second products. Every output is cast
once. The reference keeps float64 as float64.
Cost: forward 4 K FLOPs per visible pair and query head, backward 10 K; the two backward kernels each compute
the scores again, which makes it 14 K. Kept for backward: q, k, v, y and one float32 per token and query head.
A tile of queries walks the tiles of keys from its first token's first key to its last token. Only tiles on
the diagonal or across a document's start are masked. All sums have a fixed order.
"""

import math
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.attention_plan import ORDER_BLOCK, IntervalPlan, MaskPlan
from lumi.kernels.attention_tiles import architecture, tile
from lumi.kernels.custom_operator import custom_operator
from lumi.kernels.native import address, check_taken, cpu_operators
from lumi.kernels.optional_triton import HAS_TRITON, tl, triton

if HAS_TRITON:
    from triton.tools.tensor_descriptor import TensorDescriptor

MAX_K = 128


# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def attention_reference(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, plan: MaskPlan) -> Tensor:
    """Arguments, results and errors as `attention`; takes a plan of `attention_plan_reference`, any floating
    dtype and any K."""
    _check(q_BTHK, k_BTGK, v_BTGK, plan)
    q_BHTK, k_BGTK, v_BGTK = (t.transpose(1, 2) for t in (q_BTHK, k_BTGK, v_BTGK))
    causal, grouped = plan.mask is None, q_BTHK.shape[2] != k_BTGK.shape[2]
    y_BHTK = F.scaled_dot_product_attention(
        q_BHTK, k_BGTK, v_BGTK, attn_mask=plan.mask, is_causal=causal, enable_gqa=grouped
    )
    return y_BHTK.transpose(1, 2)


def _check(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, plan: MaskPlan | IntervalPlan) -> None:
    if q_BTHK.ndim != 4 or k_BTGK.ndim != 4:
        raise ValueError(
            "q and k must have shapes (B, T, H, K) and (B, T, G, K), "
            f"got {tuple(q_BTHK.shape)} and {tuple(k_BTGK.shape)}"
        )
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    if (plan.batch, plan.length) != (B, T):
        raise ValueError(
            f"q must have the plan's batch and length ({plan.batch}, {plan.length}), got ({B}, {T})"
        )
    if k_BTGK.shape != (B, T, G, K) or v_BTGK.shape != (B, T, G, K):
        raise ValueError(
            f"k and v must have shape {(B, T, 'G', K)}, got {tuple(k_BTGK.shape)} and {tuple(v_BTGK.shape)}"
        )
    if G == 0 or H % G:
        raise ValueError(f"query heads must be a multiple of kv heads, got {H} and {G}")


# --- Triton: what the kernels share. `strides` of an (N, heads, K): a pair, of a token and of a head ---


@triton.jit
@no_type_check
def _load_tile(
    source, strides, start, head, N,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of a head from token `start` on; zeros past N and HEAD_DIM. `source` is a pointer or a
    descriptor."""
    if DESCRIPTORS:
        values = source.load([start, head, 0]).reshape(ROWS, COLS)
    else:
        rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
        # Only the tile's start needs 64 bits (N * H * K can exceed 2**31); offsets inside a tile are the same
        # for all tiles.
        source += tl.cast(start, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
        pointers = source + (rows[:, None] * strides[0] + cols[None, :])
        if MASKED or HEAD_DIM != COLS:
            mask = (start + rows < N)[:, None] & (cols < HEAD_DIM)[None, :]
            values = tl.load(pointers, mask=mask, other=0.0)
        else:
            values = tl.load(pointers)
    return values


@triton.jit
@no_type_check
def _store_tile(
    target, strides, start, head, N, values,
    HEAD_DIM: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    rows, cols = tl.arange(0, ROWS), tl.arange(0, COLS)
    target += tl.cast(start, tl.int64) * strides[0] + tl.cast(head, tl.int64) * strides[1]
    pointers = target + (rows[:, None] * strides[0] + cols[None, :])
    tl.store(pointers, values, mask=(start + rows < N)[:, None] & (cols < HEAD_DIM)[None, :])


@triton.jit
@no_type_check
def _row_of_head(head, N, ORDER: tl.constexpr):
    """Where a head begins in lse and delta, whose heads are padded to whole tiles of ORDER tokens. So every
    tile of them is aligned and whole, and its loads need no mask."""
    return tl.cast(head, tl.int64) * (tl.cdiv(N, ORDER) * ORDER)


@triton.jit
@no_type_check
def _first_token(pid, num_heads, order_ptr, ORDER: tl.constexpr, BLOCK: tl.constexpr):
    """The first token and the head of a program: heads side by side, tiles with the most work first."""
    parts: tl.constexpr = ORDER // BLOCK
    rank = pid // num_heads
    first = tl.load(order_ptr + rank // parts) * ORDER + rank % parts * BLOCK
    return first, pid % num_heads


# A `span` is what a program walks: tokens begin .. end, of which full_begin .. full_end need no mask. All but
# `end` are multiples of the tile.


@triton.jit
@no_type_check
def _span_of_keys(first, last, first_key_ptr, BLOCK: tl.constexpr):
    """The keys of the queries first .. last."""
    begin = tl.load(first_key_ptr + first) // BLOCK * BLOCK
    full_end = (first + 1) // BLOCK * BLOCK
    full_begin = tl.minimum(tl.cdiv(tl.load(first_key_ptr + last), BLOCK) * BLOCK, full_end)
    return begin, full_begin, full_end, last + 1


@triton.jit
@no_type_check
def _span_of_queries(first, last, last_query_ptr, BLOCK: tl.constexpr):
    """The queries of the keys first .. last. The full ones stand between the diagonal and the first key's
    last query."""
    begin, end = first // BLOCK * BLOCK, tl.load(last_query_ptr + last) + 1
    full_begin = tl.minimum(tl.cdiv(last, BLOCK), tl.cdiv(end, BLOCK)) * BLOCK
    full_end = tl.maximum((tl.load(last_query_ptr + first) + 1) // BLOCK * BLOCK, full_begin)
    return begin, full_begin, full_end, end


@triton.jit
@no_type_check
def _bounds(span, MASKED: tl.constexpr):
    """From where to where a walk counts. The masked tiles are counted as if the full ones between them were
    not there."""
    begin, full_begin, full_end, end = span
    return (begin, end - (full_end - full_begin)) if MASKED else (full_begin, full_end)


@triton.jit
@no_type_check
def _tile_start(count, span, MASKED: tl.constexpr):
    """The first token of the tile that a walk has counted to."""
    _, full_begin, full_end, _ = span
    return tl.where(count < full_begin, count, count + (full_end - full_begin)) if MASKED else count


# --- Triton: forward. One program is a tile of queries of one head ---


@triton.jit
@no_type_check
def _fwd_walk(
    y, row_max, row_sum, q, k_source, v_source, k_strides, v_strides, kv_head, rows, first_key, span,
    N, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the span's masked tiles of keys, or its full ones, to y, row_max and row_sum."""
    low, high = _bounds(span, MASKED)
    for count in range(low, high, BLOCK_N):
        start = _tile_start(count, span, MASKED)
        k = _load_tile(
            k_source, k_strides, start, kv_head, N, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED
        )
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        if MASKED:
            offset = tl.arange(0, BLOCK_N)[None, :]
            seen = (offset <= (rows - start)[:, None]) & (offset >= (first_key - start)[:, None])
            score = tl.where(seen, score, float("-inf"))
        new_max = tl.maximum(row_max, tl.max(score, axis=1) * scale)
        # In a masked tile a row may have seen no key yet, and -inf - -inf would be NaN. Full tiles come after
        # all masked ones: by then each row has seen itself.
        shift = tl.where(new_max == float("-inf"), 0.0, new_max) if MASKED else new_max
        p = tl.exp2(score * scale - shift[:, None])
        shrink = tl.exp2(row_max - shift)
        v = _load_tile(
            v_source, v_strides, start, kv_head, N, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED
        )
        y = tl.dot(p.to(v.dtype), v, y * shrink[:, None], input_precision="ieee")
        row_max = new_max
        row_sum = row_sum * shrink + tl.sum(p, axis=1)
    return y, row_max, row_sum


@triton.jit(do_not_specialize=["N"])  # one compilation for every number of tokens
@no_type_check
def _attention_fwd_kernel(
    q_ptr, k_source, v_source, y_ptr, lse_ptr, first_key_ptr, order_ptr,
    q_strides, k_strides, v_strides, y_strides,
    N, H, group, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    first, head = _first_token(tl.program_id(0), H, order_ptr, ORDER, BLOCK_M)
    rows = first + tl.arange(0, BLOCK_M)
    lse_ptrs = lse_ptr + _row_of_head(head, N, ORDER) + rows
    if first >= N:  # the padding is read, and dropped: any finite number will do
        tl.store(lse_ptrs, tl.zeros((BLOCK_M,), dtype=tl.float32))
        return
    last = tl.minimum(first + BLOCK_M, N) - 1
    span = _span_of_keys(first, last, first_key_ptr, BLOCK_N)
    first_key = tl.load(first_key_ptr + rows, mask=rows < N, other=0)
    q = _load_tile(q_ptr, q_strides, first, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, False, True)
    kv_head = head // group

    row_max = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_M,), dtype=tl.float32)
    y = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    y, row_max, row_sum = _fwd_walk(
        y, row_max, row_sum, q, k_source, v_source, k_strides, v_strides, kv_head, rows, first_key, span,
        N, scale, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED=True,
    )  # fmt: skip
    y, row_max, row_sum = _fwd_walk(
        y, row_max, row_sum, q, k_source, v_source, k_strides, v_strides, kv_head, rows, first_key, span,
        N, scale, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED=False,
    )  # fmt: skip

    _store_tile(y_ptr, y_strides, first, head, N, y / row_sum[:, None], HEAD_DIM, BLOCK_M, BLOCK_K)
    tl.store(lse_ptrs, row_max + tl.log2(row_sum))


# --- Triton: backward. delta, then dk and dv by tiles of keys, then dq by tiles of queries ---


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _attention_delta_kernel(
    dy_ptr, y_ptr, delta_ptr,
    dy_strides, y_strides,
    N,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, ORDER: tl.constexpr,
):  # fmt: skip
    first, head = tl.program_id(0) * BLOCK_M, tl.program_id(1)
    dy = _load_tile(dy_ptr, dy_strides, first, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, False, True)
    y = _load_tile(y_ptr, y_strides, first, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, False, True)
    delta = tl.sum(dy.to(tl.float32) * y.to(tl.float32), axis=1)
    # Past N dy and y were loaded as zeros: so is delta, and dz of the padding is zero.
    tl.store(delta_ptr + _row_of_head(head, N, ORDER) + first + tl.arange(0, BLOCK_M), delta)


@triton.jit
@no_type_check
def _dkdv_walk(
    dk, dv, k, v, q_source, dy_source, q_strides, dy_strides, lse_head, delta_head, head, keys,
    last_query, span, N, scale,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the span's masked tiles of queries, or its full ones, to dk and dv.

    Scores are transposed here, keys by queries: so p and dz enter their products as they are.
    """
    low, high = _bounds(span, MASKED)
    for count in range(low, high, BLOCK_M):
        start = tl.multiple_of(_tile_start(count, span, MASKED), BLOCK_M)
        rows = start + tl.arange(0, BLOCK_M)
        q = _load_tile(q_source, q_strides, start, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, DESCRIPTORS, MASKED)
        lse = tl.load(lse_head + rows)
        score = tl.dot(k, tl.trans(q), input_precision="ieee")
        p = tl.exp2(score * scale - lse[None, :])
        if MASKED:
            # Against a column's own number: rows[None, :] would be a register for each column.
            offset = tl.arange(0, BLOCK_M)[None, :]
            p = tl.where(
                (offset >= (keys - start)[:, None]) & (offset <= (last_query - start)[:, None]), p, 0.0
            )
        dy = _load_tile(
            dy_source, dy_strides, start, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, DESCRIPTORS, MASKED
        )
        dv = tl.dot(p.to(dy.dtype), dy, dv, input_precision="ieee")
        delta = tl.load(delta_head + rows)
        dz = p * (tl.dot(v, tl.trans(dy), input_precision="ieee") - delta[None, :])
        dk = tl.dot(dz.to(q.dtype), q, dk, input_precision="ieee")
    return dk, dv


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _attention_dkdv_kernel(
    q_source, k_ptr, v_ptr, dy_source, lse_ptr, delta_ptr, dk_ptr, dv_ptr, last_query_ptr, order_ptr,
    q_strides, k_strides, v_strides, dy_strides, dk_strides, dv_strides,
    N, G, group, scale, dscore,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    first, kv_head = _first_token(tl.program_id(0), G, order_ptr, ORDER, BLOCK_N)
    if first >= N:
        return
    last = tl.minimum(first + BLOCK_N, N) - 1
    span = _span_of_queries(first, last, last_query_ptr, BLOCK_M)
    keys = first + tl.arange(0, BLOCK_N)
    last_query = tl.load(last_query_ptr + keys, mask=keys < N, other=-1)
    k = _load_tile(k_ptr, k_strides, first, kv_head, N, HEAD_DIM, BLOCK_N, BLOCK_K, False, True)
    v = _load_tile(v_ptr, v_strides, first, kv_head, N, HEAD_DIM, BLOCK_N, BLOCK_K, False, True)

    dk = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    dv = tl.zeros((BLOCK_N, BLOCK_K), dtype=tl.float32)
    for member in range(group):  # every query head that reads this kv head, in order: no atomics
        head = kv_head * group + member
        row_of_head = _row_of_head(head, N, ORDER)
        lse_head, delta_head = lse_ptr + row_of_head, delta_ptr + row_of_head
        dk, dv = _dkdv_walk(
            dk, dv, k, v, q_source, dy_source, q_strides, dy_strides, lse_head, delta_head, head, keys,
            last_query, span, N, scale, HEAD_DIM, BLOCK_M, BLOCK_K, DESCRIPTORS, MASKED=True,
        )  # fmt: skip
        dk, dv = _dkdv_walk(
            dk, dv, k, v, q_source, dy_source, q_strides, dy_strides, lse_head, delta_head, head, keys,
            last_query, span, N, scale, HEAD_DIM, BLOCK_M, BLOCK_K, DESCRIPTORS, MASKED=False,
        )  # fmt: skip
    _store_tile(dk_ptr, dk_strides, first, kv_head, N, dk * dscore, HEAD_DIM, BLOCK_N, BLOCK_K)
    _store_tile(dv_ptr, dv_strides, first, kv_head, N, dv, HEAD_DIM, BLOCK_N, BLOCK_K)


@triton.jit
@no_type_check
def _dq_walk(
    dq, q, dy, lse, delta, k_source, v_source, k_strides, v_strides, kv_head, rows, first_key, span,
    N, scale,
    HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    DESCRIPTORS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Adds the span's masked tiles of keys, or its full ones, to dq."""
    low, high = _bounds(span, MASKED)
    for count in range(low, high, BLOCK_N):
        start = _tile_start(count, span, MASKED)
        k = _load_tile(
            k_source, k_strides, start, kv_head, N, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED
        )
        score = tl.dot(q, tl.trans(k), input_precision="ieee")
        p = tl.exp2(score * scale - lse[:, None])
        if MASKED:
            offset = tl.arange(0, BLOCK_N)[None, :]
            p = tl.where(
                (offset <= (rows - start)[:, None]) & (offset >= (first_key - start)[:, None]), p, 0.0
            )
        v = _load_tile(
            v_source, v_strides, start, kv_head, N, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED
        )
        dz = p * (tl.dot(dy, tl.trans(v), input_precision="ieee") - delta[:, None])
        dq = tl.dot(dz.to(k.dtype), k, dq, input_precision="ieee")
    return dq


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _attention_dq_kernel(
    q_ptr, k_source, v_source, dy_ptr, lse_ptr, delta_ptr, dq_ptr, first_key_ptr, order_ptr,
    q_strides, k_strides, v_strides, dy_strides, dq_strides,
    N, H, group, scale, dscore,
    HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    ORDER: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    first, head = _first_token(tl.program_id(0), H, order_ptr, ORDER, BLOCK_M)
    if first >= N:
        return
    last = tl.minimum(first + BLOCK_M, N) - 1
    span = _span_of_keys(first, last, first_key_ptr, BLOCK_N)
    rows = first + tl.arange(0, BLOCK_M)
    first_key = tl.load(first_key_ptr + rows, mask=rows < N, other=0)
    kv_head = head // group
    q = _load_tile(q_ptr, q_strides, first, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, False, True)
    dy = _load_tile(dy_ptr, dy_strides, first, head, N, HEAD_DIM, BLOCK_M, BLOCK_K, False, True)
    row_of_head = _row_of_head(head, N, ORDER)
    lse, delta = tl.load(lse_ptr + row_of_head + rows), tl.load(delta_ptr + row_of_head + rows)

    dq = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    dq = _dq_walk(
        dq, q, dy, lse, delta, k_source, v_source, k_strides, v_strides, kv_head, rows, first_key, span,
        N, scale, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED=True,
    )  # fmt: skip
    dq = _dq_walk(
        dq, q, dy, lse, delta, k_source, v_source, k_strides, v_strides, kv_head, rows, first_key, span,
        N, scale, HEAD_DIM, BLOCK_N, BLOCK_K, DESCRIPTORS, MASKED=False,
    )  # fmt: skip
    _store_tile(dq_ptr, dq_strides, first, head, N, dq * dscore, HEAD_DIM, BLOCK_M, BLOCK_K)


# --- launchers: allocate, pick tiles, launch. Never autograd. ---


def _tokens(t_BTHK: Tensor) -> Tensor:
    """(B, T, H, K) as (N, H, K) with unit stride in a head: a view if one stride can walk the tokens, else a
    copy."""
    t_NHK = t_BTHK.flatten(0, 1)
    return t_NHK if t_NHK.stride(2) == 1 else t_NHK.contiguous()


def _grid(N: int, heads: int, block: int) -> tuple[int]:
    return (triton.cdiv(N, ORDER_BLOCK) * (ORDER_BLOCK // block) * heads,)


def _scales(K: int) -> tuple[float, float]:
    """`scale` turns products into the logarithms, to base 2, of weights; `dscore` is the factor of the
    gradients of q and k."""
    root = 1 / math.sqrt(K)
    return root * math.log2(math.e), root


def _sources(config: dict[str, Any], rows: int, *tensors: Tensor) -> tuple[dict[str, Any], list[Any]]:
    """The tensors that a kernel walks in tiles of `rows` tokens, as descriptors for the bulk tensor copy
    engine if `config` asks for them.

    The engine needs 16-byte alignment: a tensor without it is copied. A K that does not allow it makes them
    plain pointers."""
    if not config["DESCRIPTORS"] or any(
        t.numel() == 0 or t.shape[2] * t.element_size() % 16 for t in tensors
    ):
        return {**config, "DESCRIPTORS": False}, list(tensors)
    tensors = tuple(t if _is_aligned(t) else t.clone(memory_format=torch.contiguous_format) for t in tensors)
    return config, [
        TensorDescriptor(t, list(t.shape), list(t.stride()), [rows, 1, config["BLOCK_K"]]) for t in tensors
    ]


def _is_aligned(t_NGK: Tensor) -> bool:
    strides = t_NGK.stride()[:2]
    return t_NGK.data_ptr() % 16 == 0 and all(
        stride > 0 and stride * t_NGK.element_size() % 16 == 0 for stride in strides
    )


def _strides(*tensors: Tensor) -> list[tuple[int, ...]]:
    return [t.stride()[:2] for t in tensors]


def attention_fwd(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, first_key_N: Tensor, order_C: Tensor
) -> tuple[Tensor, Tensor]:
    """Returns y_NHK in q's dtype and lse_HL in float32, the log2 of every row's sum.

    Inputs may have any strides, except that the stride inside a head is 1.
    """
    (N, H, K), G = q_NHK.shape, k_NGK.shape[1]
    y_NHK = torch.empty(N, H, K, dtype=q_NHK.dtype, device=q_NHK.device)
    lse_HL = torch.empty(H, len(order_C) * ORDER_BLOCK, dtype=torch.float32, device=q_NHK.device)
    config = tile("fwd", K, q_NHK.dtype, architecture(q_NHK.device))
    config, (k, v) = _sources(config, config["BLOCK_N"], k_NGK, v_NGK)
    scale, _ = _scales(K)
    with torch.cuda.device_of(q_NHK):  # Triton launches on the current device, which need not be q's
        _attention_fwd_kernel[_grid(N, H, config["BLOCK_M"])](
            q_NHK, k, v, y_NHK, lse_HL, first_key_N, order_C, *_strides(q_NHK, k_NGK, v_NGK, y_NHK),
            N, H, H // G, scale, HEAD_DIM=K, ORDER=ORDER_BLOCK, **config,
        )  # fmt: skip
    return y_NHK, lse_HL


def attention_bwd(
    dy_NHK: Tensor, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, y_NHK: Tensor, lse_HL: Tensor,
    first_key_N: Tensor, last_query_N: Tensor, query_order_C: Tensor, key_order_C: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Returns dq_NHK, dk_NGK and dv_NGK in q's dtype. Writes to no input."""
    (N, H, K), G = q_NHK.shape, k_NGK.shape[1]
    dq_NHK, dk_NGK, dv_NGK = (
        torch.empty(N, heads, K, dtype=q_NHK.dtype, device=q_NHK.device) for heads in (H, G, G)
    )
    delta_HL = torch.empty_like(lse_HL)
    arch = architecture(q_NHK.device)
    delta, dkdv, dq = (tile(name, K, q_NHK.dtype, arch) for name in ("delta", "dkdv", "dq"))
    dkdv, (q, dy) = _sources(dkdv, dkdv["BLOCK_M"], q_NHK, dy_NHK)
    dq, (k, v) = _sources(dq, dq["BLOCK_N"], k_NGK, v_NGK)
    strides = _strides(q_NHK, k_NGK, v_NGK, dy_NHK)
    with torch.cuda.device_of(q_NHK):
        _attention_delta_kernel[(lse_HL.shape[1] // delta["BLOCK_M"], H)](
            dy_NHK, y_NHK, delta_HL, *_strides(dy_NHK, y_NHK), N, HEAD_DIM=K, ORDER=ORDER_BLOCK, **delta
        )
        _attention_dkdv_kernel[_grid(N, G, dkdv["BLOCK_N"])](
            q, k_NGK, v_NGK, dy, lse_HL, delta_HL, dk_NGK, dv_NGK, last_query_N, key_order_C,
            *strides, *_strides(dk_NGK, dv_NGK),
            N, G, H // G, *_scales(K), HEAD_DIM=K, ORDER=ORDER_BLOCK, **dkdv,
        )  # fmt: skip
        _attention_dq_kernel[_grid(N, H, dq["BLOCK_M"])](
            q_NHK, k, v, dy_NHK, lse_HL, delta_HL, dq_NHK, first_key_N, query_order_C,
            *strides, *_strides(dq_NHK),
            N, H, H // G, *_scales(K), HEAD_DIM=K, ORDER=ORDER_BLOCK, **dq,
        )  # fmt: skip
    return dq_NHK, dk_NGK, dv_NGK


# --- C++ for CPUs: the same, by csrc/cpu/attention.h ---


def native_attention_fwd(
    q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, first_key_N: Tensor
) -> tuple[Tensor, Tensor]:
    """As `attention_fwd`, but the second result is lse_HN, not padded, and the natural logarithm."""
    (N, H, K), G, operators = q_NHK.shape, k_NGK.shape[1], cpu_operators(q_NHK.dtype)
    y_NHK, lse_HN = torch.empty(q_NHK.shape, dtype=q_NHK.dtype), torch.empty(H, N)
    starts, *scratch = _spans(first_key_N, K, q_NHK.dtype, backward=False)
    inputs = q_NHK, k_NGK, v_NGK
    operators.attention(
        *map(address, (*inputs, first_key_N, starts, y_NHK, lse_HN, scratch[0])), scratch[1],
        len(starts) - 1, H, G, K, *(s for t in inputs for s in t.stride()[:2]), torch.get_num_threads(),
    )  # fmt: skip
    return y_NHK, lse_HN


def native_attention_bwd(
    dy_NHK: Tensor, q_NHK: Tensor, k_NGK: Tensor, v_NGK: Tensor, y_NHK: Tensor, lse_HN: Tensor,
    first_key_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """As `attention_bwd`."""
    (_, H, K), G, operators = q_NHK.shape, k_NGK.shape[1], cpu_operators(q_NHK.dtype)
    outputs = dq, dk, dv = [torch.empty(t.shape, dtype=t.dtype) for t in (q_NHK, k_NGK, v_NGK)]
    starts, *scratch = _spans(first_key_N, K, q_NHK.dtype, backward=True)
    inputs = dy_NHK, q_NHK, k_NGK, v_NGK, y_NHK
    operators.attention_backward(
        *map(address, (*inputs, lse_HN, first_key_N, starts, *outputs, scratch[0])), scratch[1],
        len(starts) - 1, H, G, K, *(s for t in inputs for s in t.stride()[:2]), torch.get_num_threads(),
    )  # fmt: skip
    return dq, dk, dv


def _spans(first_key_N: Tensor, K: int, dtype: torch.dtype, backward: bool) -> tuple[Tensor, Tensor, int]:
    """Where the spans of tokens start that see nothing before them (and the number of tokens), and scratch
    memory for all threads with the size of one's part."""
    N, threads = len(first_key_N), torch.get_num_threads()
    starts = (first_key_N == torch.arange(N)).nonzero()[:, 0]
    starts = torch.cat((starts, torch.tensor([N])))
    size = cpu_operators(dtype).attention_scratch(int(starts.diff().max()) if N else 0, K, backward)
    return starts, torch.empty(threads * size), size


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@custom_operator("lumi::attention")
def _attention_op(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    first_key: Tensor,
    last_query: Tensor,
    query_order: Tensor,
    key_order: Tensor,
    native: bool = False,
) -> tuple[Tensor, Tensor]:
    inputs = _tokens(q), _tokens(k), _tokens(v), first_key
    y_NHK, lse_HN = native_attention_fwd(*inputs) if native else attention_fwd(*inputs, query_order)
    return y_NHK.view(q.shape), lse_HN


@custom_operator("lumi::attention_backward")
def _attention_backward_op(
    dy: Tensor, q: Tensor, k: Tensor, v: Tensor, y: Tensor, lse: Tensor,
    first_key: Tensor, last_query: Tensor, query_order: Tensor, key_order: Tensor, native: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    inputs = _tokens(dy), _tokens(q), _tokens(k), _tokens(v), _tokens(y), lse, first_key
    if native:
        dq_NHK, dk_NGK, dv_NGK = native_attention_bwd(*inputs)
    else:
        dq_NHK, dk_NGK, dv_NGK = attention_bwd(*inputs, last_query, query_order, key_order)
    return dq_NHK.view(q.shape), dk_NGK.view(k.shape), dv_NGK.view(v.shape)


@_attention_op.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, first_key: Tensor, last_query: Tensor,
    query_order: Tensor, key_order: Tensor, native: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    rows = first_key.shape[0] if native else query_order.shape[0] * ORDER_BLOCK  # `len` would fix a length
    return q.new_empty(q.shape), q.new_empty(q.shape[2], rows, dtype=torch.float32)


@_attention_backward_op.register_fake
def _(dy: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, *plan, ctx.native = inputs
    y, lse = output
    ctx.mark_non_differentiable(lse)
    ctx.set_materialize_grads(False)  # or autograd would fill an (H, N) with zeros, as the gradient of lse
    ctx.save_for_backward(q, k, v, y, lse, *plan)


def _backward(ctx: Any, dy: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 8
    return *_attention_backward_op(dy, *ctx.saved_tensors, ctx.native), *(None,) * 5


_attention_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def attention(q: Tensor, k: Tensor, v: Tensor, plan: IntervalPlan) -> Tensor:
    """Causal attention inside each document.

    Args:
        q: queries (B, T, H, K), already rotated, float32 / bfloat16 / float16, any strides. K <= 128.
        k: keys (B, T, G, K), same dtype; G divides H.
        v: values (B, T, G, K), same dtype.
        plan: from `attention_plan` for this B and T. It holds the documents and the window.

    Returns:
        y (B, T, H, K), dtype of `q`, contiguous. Differentiable once, in q, k and v.

    Raises:
        ValueError: if the shapes do not fit each other or the plan, dtypes or devices differ, a dtype is none
            of the three, or K is above 128.

    Source: Dao 2023, https://arxiv.org/abs/2307.08691.
    """
    _check(q, k, v, plan)
    if q.shape[-1] > MAX_K:
        raise ValueError(
            f"head_dim must be at most {MAX_K} for this kernel, got {q.shape[-1]}; "
            '"kernels": "reference" takes any'
        )
    _check_kind(q, k, v, plan)
    y, _ = _attention_op(q, k, v, plan.first_key, plan.last_query, plan.query_order, plan.key_order)
    return y


def attention_native(q: Tensor, k: Tensor, v: Tensor, plan: IntervalPlan) -> Tensor:
    """As `attention`, in C++, with any K: float32 or bfloat16 on a CPU."""
    check_taken(q, k, v)
    _check(q, k, v, plan)
    _check_kind(q, k, v, plan)
    y, _ = _attention_op(q, k, v, plan.first_key, plan.last_query, plan.query_order, plan.key_order, True)
    return y


def _check_kind(q: Tensor, k: Tensor, v: Tensor, plan: IntervalPlan) -> None:
    for name, tensor in (("q", q), ("k", k), ("v", v), ("the plan", plan.first_key)):
        if tensor.device != q.device:
            raise ValueError(f"{name} must be on the device of q, {q.device}, got {tensor.device}")
    if not q.dtype == k.dtype == v.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"q, k and v must all be float32, bfloat16 or float16, got {q.dtype}, {k.dtype} and {v.dtype}"
        )
