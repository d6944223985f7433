"""Attention against a key-value cache, contiguous or in pages, for prefill and decoding alike.

    y_bt = sum over s of softmax_s(q_bt . k_bs / sqrt(K)) v_bs,   s <= position of query t of row b;
    with a window also s > position - window

A single query per row leaves most of a GPU idle. So the keys are split among programs, and each program
reduces its share to a partial result: the largest score m_i, the sum l_i of 2^(score - m_i), and the same sum
a_i weighted with values. A second kernel merges them:

    y = sum_i 2^(m_i - m) a_i / sum_i 2^(m_i - m) l_i,   m = max_i m_i

Online softmax: Milakov & Gimelshein 2018, https://arxiv.org/abs/1805.02867; split keys: Dao et al. 2023,
Flash-Decoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; pages: Kwon et al. 2023,
https://arxiv.org/abs/2309.06180.

Shape letters: B batch, T new tokens, S cache slots, H query heads, G kv heads (H a multiple of G), K head
dim, P pages, N = B * T * H rows of results, I shares that the keys are split into.
Precision: scores, softmax and both accumulators are float32 (the reference keeps float64 as float64). The
weights are rounded to the dtype of the values for the tensor cores; float32 is multiplied as float32. y is
cast once.
Cost: a tile of up to 64 (query, head) pairs reads the slots up to its largest position once, with a window
from the first on that one of them sees. In decoding that is one read of the cache, or of the window, whatever
the number of query heads per kv head. Each share adds (K + 2) * 4 bytes,
written and read, per row of results.
"""

from functools import cache
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.custom_operator import custom_operator
from lumi.kernels.native import address, check_taken, cpu_operators
from lumi.kernels.optional_triton import tl, triton

MAX_K = 256  # a tile's accumulator is held in registers
MIN_PAGE_SIZE = 16
MAX_SPLITS = 128
_MIN_BLOCK = 16  # tensor cores take no less: rows and head dims are padded to it
_MAX_BLOCK_M = 64
_TILE = 8192  # the most elements of a tile of keys, of values, and of the accumulator
_SCORES = 4096  # the most elements of a tile of scores
_PROGRAMS_PER_SM = 4  # more than are resident together, so that rows of different lengths level out
_INTERPRETER_PROGRAMS = 12  # enough that the interpreter's tests split their keys
_COMBINE_SPLITS = 16  # shares that the second kernel holds at a time


# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def decode_attention_reference(
    q_BTHK: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions_BT: Tensor,
    page_table: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Arguments, result and errors as `decode_attention`, in any floating dtype and with any K.

    Two things differ. Slots that no query sees must be finite, such as zeros: they get weight zero, and zero
    times NaN is NaN. Work grows with S: pass the used part of a large cache.
    """
    _check_shapes(q_BTHK, k_cache, v_cache, positions_BT, page_table, window)
    if page_table is not None:
        # Entries past a row's last page may be any number; what they refer to is masked below.
        pages = page_table.long().clamp(0, len(k_cache) - 1)
        k_cache, v_cache = k_cache[pages].flatten(1, 2), v_cache[pages].flatten(1, 2)
    slots_S = torch.arange(k_cache.shape[1], device=q_BTHK.device)
    visible_BTS = slots_S <= positions_BT[..., None]
    if window is not None:
        visible_BTS &= slots_S > positions_BT[..., None] - window
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_cache.transpose(1, 2),
        v_cache.transpose(1, 2),
        attn_mask=visible_BTS[:, None],
        enable_gqa=q_BTHK.shape[2] != k_cache.shape[2],
    )
    return y_BHTK.transpose(1, 2)


def _check_shapes(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    window: int | None,
) -> None:
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, got {window}")
    if q.ndim != 4:
        raise ValueError(f"q must have shape (B, T, H, K), got {tuple(q.shape)}")
    B, T, H, K = q.shape
    fits = k_cache.ndim == 4 and k_cache.shape[3] == K and v_cache.shape == k_cache.shape
    if not fits or (page_table is None and k_cache.shape[0] != B):
        expected = (B, "S", "G", K) if page_table is None else ("P", "page_size", "G", K)
        raise ValueError(
            f"the caches must have shape {expected}, got {tuple(k_cache.shape)} and {tuple(v_cache.shape)}"
        )
    if positions.shape != (B, T):
        raise ValueError(f"positions must have shape {(B, T)}, got {tuple(positions.shape)}")
    G = k_cache.shape[2]
    if G == 0 or H % G:
        raise ValueError(f"query heads must be a multiple of kv heads, got {H} and {G}")
    if page_table is None:
        return
    if page_table.ndim != 2 or page_table.shape[0] != B or page_table.dtype != torch.int32:
        raise ValueError(
            f"page_table must be int32 of shape ({B}, max_pages), "
            f"got {page_table.dtype} of shape {tuple(page_table.shape)}"
        )
    num_pages, page_size = k_cache.shape[:2]
    if page_size < MIN_PAGE_SIZE or page_size & (page_size - 1) or num_pages == 0:
        raise ValueError(
            f"the caches must have pages of a power of two, at least {MIN_PAGE_SIZE} slots, "
            f"got {num_pages} pages of {page_size}"
        )


# --- Triton: a tile of (query, head) pairs that share a kv head, against one share of the keys ---


@triton.jit(do_not_specialize=["stride_pb", "stride_pt", "stride_tb", "T", "S", "G", "num_tiles"])
@no_type_check
def _decode_attention_kernel(
    q_ptr, k_ptr, v_ptr, positions_ptr, page_table_ptr, out_ptr, max_ptr, sum_ptr, shares_ptr,
    q_strides, k_strides, v_strides, stride_pb, stride_pt, stride_tb,
    T, S, G, num_tiles, scale,
    K: tl.constexpr, GROUP: tl.constexpr, PAGE_SIZE: tl.constexpr, WINDOW: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr, MIN_SHARE: tl.constexpr,
):  # fmt: skip
    # `strides` are of (row, token, head); in pages (PAGE_SIZE > 0) those of k and v are of (page, slot,
    # head). `scale` holds log2(e): the softmax is one of powers of two. Without SPLIT out is y (N, K), with
    # it out are partial sums (N, I, K) beside max and sum (N, I), of which the first shares (N) are written.
    # A prompt's last queries see the most keys, so they start first. WINDOW is 0 where there is none.
    row_tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    batch_head = tl.program_id(0) // num_tiles
    # int64: sizes of caches can exceed 2**31.
    b, g = (batch_head // G).to(tl.int64), (batch_head % G).to(tl.int64)
    rows = row_tile * BLOCK_M + tl.arange(0, BLOCK_M)
    t, head = (rows // GROUP).to(tl.int64), g * GROUP + rows % GROUP
    inside = t < T
    cols = tl.arange(0, BLOCK_K)

    q_offsets = b * q_strides[0] + t * q_strides[1] + head * q_strides[2]
    q_mask = inside[:, None] & (cols < K)[None, :]
    q = tl.load(q_ptr + q_offsets[:, None] + cols[None, :], mask=q_mask, other=0.0)
    positions = tl.load(positions_ptr + b * stride_pb + t * stride_pt, mask=inside, other=-1)
    # Clamped: whatever the positions are, nothing outside the cache is read.
    positions = tl.maximum(tl.minimum(positions, S - 1), -1).to(tl.int32)
    end = tl.max(positions, axis=0) + 1

    # Shared out in the kernel: the host does not know how many slots are in use. No share is smaller than
    # MIN_SHARE blocks but the last, whatever the cache could hold; programs that are left over do nothing.
    num_blocks, first_block = tl.cdiv(end, BLOCK_S), 0
    if WINDOW > 0:
        # The first slot that a query sees; queries that see nothing do not count.
        least = tl.min(tl.where(positions < 0, S, positions), axis=0)
        begin = tl.minimum(tl.maximum(least - WINDOW + 1, 0), end)
        first_block = begin // BLOCK_S
    wanted = tl.minimum(tl.cdiv(num_blocks - first_block, MIN_SHARE), tl.num_programs(1))
    share = tl.maximum(tl.cdiv(num_blocks - first_block, tl.maximum(wanted, 1)), 1)
    shares = tl.maximum(tl.cdiv(num_blocks - first_block, share), 1)  # one of nothing: it stores zeros
    if tl.program_id(1) >= shares:
        return
    first = first_block + tl.program_id(1) * share

    # Not -inf: the difference of two would be NaN where nothing is visible.
    largest = tl.full((BLOCK_M,), -3.4e38, dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    acc = tl.zeros((BLOCK_M, BLOCK_K), dtype=tl.float32)
    if PAGE_SIZE > 0:
        table = page_table_ptr + b * stride_tb
        slots = first * BLOCK_S + tl.arange(0, BLOCK_S)
        wanted = slots < end
        if WINDOW > 0:
            wanted = wanted & (slots >= begin)
        page = tl.load(table + slots // PAGE_SIZE, mask=wanted, other=0).to(tl.int64)
    for block in range(first, tl.minimum(first + share, num_blocks)):
        slots = block * BLOCK_S + tl.arange(0, BLOCK_S)
        if PAGE_SIZE > 0:
            base, slot = page, (slots % PAGE_SIZE).to(tl.int64)
            # The next step's pages are loaded now, so that its loads of keys and values need not wait.
            following = slots + BLOCK_S
            page = tl.load(table + following // PAGE_SIZE, mask=following < end, other=0).to(tl.int64)
        else:
            base, slot = b, slots.to(tl.int64)
        mask = (slots < end)[:, None] & (cols < K)[None, :]  # for values too: a weight of 0 times NaN is NaN
        if WINDOW > 0:
            mask = mask & (slots >= begin)[:, None]
        k_offsets = base * k_strides[0] + slot * k_strides[1] + g * k_strides[2]
        k = tl.load(k_ptr + k_offsets[:, None] + cols[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(slots[None, :] <= positions[:, None], scores, float("-inf"))
        if WINDOW > 0:
            scores = tl.where(slots[None, :] > positions[:, None] - WINDOW, scores, float("-inf"))

        larger = tl.maximum(largest, tl.max(scores, axis=1))
        weights = tl.exp2(scores - larger[:, None])
        shrink = tl.exp2(largest - larger)
        total = total * shrink + tl.sum(weights, axis=1)
        v_offsets = base * v_strides[0] + slot * v_strides[1] + g * v_strides[2]
        v = tl.load(v_ptr + v_offsets[:, None] + cols[None, :], mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        largest = larger

    n = (b * T + t) * (G * GROUP) + head
    if SPLIT:
        if tl.program_id(1) == 0:
            tl.store(shares_ptr + n, shares, mask=inside)
        n = n * tl.num_programs(1) + tl.program_id(1)
        tl.store(max_ptr + n, largest, mask=inside)
        tl.store(sum_ptr + n, total, mask=inside)
    else:
        acc = acc / tl.where(total == 0.0, 1.0, total)[:, None]
    tl.store(out_ptr + n[:, None] * K + cols[None, :], acc, mask=q_mask)


@triton.jit(do_not_specialize=["num_splits"])
@no_type_check
def _combine_kernel(
    partial_ptr, max_ptr, sum_ptr, shares_ptr, y_ptr,
    num_splits,
    K: tl.constexpr, MAX_SPLITS: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    shares = tl.load(shares_ptr + n)  # of the num_splits that there is room for
    every = tl.arange(0, MAX_SPLITS)
    maxima = tl.load(max_ptr + n * num_splits + every, mask=every < shares, other=float("-inf"))
    sums = tl.load(sum_ptr + n * num_splits + every, mask=every < shares, other=0.0)
    # Finite: a share in which a row sees nothing has the lowest number and a sum of zero.
    largest = tl.max(maxima, axis=0)
    total = tl.sum(tl.exp2(maxima - largest) * sums, axis=0)

    cols = tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_I, BLOCK_K), dtype=tl.float32)  # summed over BLOCK_I once, after the loop
    for start in range(0, shares, BLOCK_I):
        splits = start + tl.arange(0, BLOCK_I)
        some = tl.load(max_ptr + n * num_splits + splits, mask=splits < shares, other=float("-inf"))
        weights = tl.exp2(some - largest)
        mask = (splits < shares)[:, None] & (cols < K)[None, :]
        partial_ptrs = partial_ptr + (n * num_splits + splits)[:, None] * K + cols[None, :]
        acc += weights[:, None] * tl.load(partial_ptrs, mask=mask, other=0.0)
    y = tl.sum(acc, axis=0) / tl.where(total == 0.0, 1.0, total)
    tl.store(y_ptr + n * K + cols, y, mask=cols < K)


# --- launcher: allocate, pick block sizes, launch. Never autograd. ---


def tile_config(K: int, rows: int, dtype: torch.dtype) -> dict[str, int]:
    """Blocks, MIN_SHARE, num_warps and num_stages for `rows` (query, head) pairs per kv head.

    A share of fewer than MIN_SHARE blocks of keys would gain less than its partial result costs.
    """
    block_k = max(triton.next_power_of_2(K), _MIN_BLOCK)
    block_m = min(max(triton.next_power_of_2(rows), _MIN_BLOCK), _MAX_BLOCK_M, _TILE // block_k)
    block_s = min(_TILE // block_k, _SCORES // block_m, 4 * block_k)
    if dtype.itemsize == 4:  # no tensor cores: operands stand in registers, which larger tiles exhaust
        block_m = block_s = _MIN_BLOCK
    return {
        "MIN_SHARE": max(2, 4 * block_m // block_s),
        "BLOCK_M": block_m,
        "BLOCK_S": block_s,
        "BLOCK_K": block_k,
        "num_warps": 8 if dtype.itemsize == 4 or block_m > _MIN_BLOCK else 4,
        "num_stages": 3,
    }


def combine_config(K: int) -> dict[str, int]:
    """MAX_SPLITS, BLOCK_I, BLOCK_K and num_warps for heads of K elements."""
    return {
        "MAX_SPLITS": MAX_SPLITS,
        "BLOCK_I": _COMBINE_SPLITS,
        "BLOCK_K": max(triton.next_power_of_2(K), _MIN_BLOCK),
        "num_warps": 4,
    }


@cache
def _wanted_programs(device: torch.device) -> int:
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * _PROGRAMS_PER_SM


def num_splits(programs: int, S: int, config: dict[str, int], device: torch.device) -> int:
    """The most shares of the keys: enough to fill the GPU, and no more than S slots can use.

    It depends on sizes alone: reading positions from device memory would make the host wait. How many shares
    a row has, the kernel finds from its own positions. So a row's result is the same in a cache of any S.
    """
    wanted = triton.cdiv(_wanted_programs(device), programs)
    most = triton.cdiv(S, config["MIN_SHARE"] * config["BLOCK_S"])
    return max(min(wanted, most, MAX_SPLITS), 1)


def decode_attention_launch(
    q_BTHK: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions_BT: Tensor,
    page_table: Tensor | None,
    splits: int | None = None,
    window: int | None = None,
) -> Tensor:
    """Returns y_BTHK, contiguous, in q's dtype.

    The last stride of q, the caches and the table is 1; all others are free. `splits` is the most shares
    of the keys, up to MAX_SPLITS; None leaves it to `num_splits`.
    """
    B, T, H, K = q_BTHK.shape
    G = k_cache.shape[2]
    y_BTHK = torch.empty(B, T, H, K, dtype=q_BTHK.dtype, device=q_BTHK.device)
    if y_BTHK.numel() == 0:
        return y_BTHK
    group, page_size, S = H // G, 0, k_cache.shape[1]
    if page_table is not None:
        page_size, S = k_cache.shape[1], k_cache.shape[1] * page_table.shape[1]
    config = tile_config(K, T * group, q_BTHK.dtype)
    num_tiles = triton.cdiv(T * group, config["BLOCK_M"])
    if splits is None:
        seen = S if window is None else min(S, window + config["BLOCK_S"] - 1)  # of a query, in whole blocks
        splits = num_splits(num_tiles * B * G, seen, config, q_BTHK.device)

    out, maxima, sums, shares = y_BTHK, None, None, None
    if splits > 1:
        out = torch.empty(B * T * H, splits, K, dtype=torch.float32, device=q_BTHK.device)
        maxima, sums = (
            torch.empty(B * T * H, splits, dtype=torch.float32, device=q_BTHK.device) for _ in range(2)
        )
        shares = torch.empty(B * T * H, dtype=torch.int32, device=q_BTHK.device)
    strides = [t.stride()[:3] for t in (q_BTHK, k_cache, v_cache)]
    table_stride = 0 if page_table is None else page_table.stride(0)
    with torch.cuda.device_of(q_BTHK):  # Triton launches on the current device, which need not be q's
        _decode_attention_kernel[(num_tiles * B * G, splits)](
            q_BTHK, k_cache, v_cache, positions_BT, page_table, out, maxima, sums, shares,
            *strides, *positions_BT.stride(), table_stride,
            T, S, G, num_tiles, K**-0.5 * 1.4426950408889634,
            K=K, GROUP=group, PAGE_SIZE=page_size, WINDOW=window or 0, SPLIT=splits > 1, **config,
        )  # fmt: skip
        if splits > 1:
            _combine_kernel[(B * T * H,)](out, maxima, sums, shares, y_BTHK, splits, K=K, **combine_config(K))
    return y_BTHK


# --- C++ for CPUs: the same, by csrc/cpu/decode_attention.h ---


def native_decode_attention(
    q_BTHK: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions_BT: Tensor,
    page_table: Tensor | None,
    window: int | None,
) -> Tensor:
    """As `decode_attention_launch`."""
    (B, T, H, K), G, operators = q_BTHK.shape, k_cache.shape[2], cpu_operators(q_BTHK.dtype)
    y_BTHK = torch.empty(q_BTHK.shape, dtype=q_BTHK.dtype)
    page_size, table_stride, slots = 0, 0, k_cache.shape[1]
    if page_table is not None:
        page_size, table_stride = k_cache.shape[1], page_table.stride(0)
        slots = page_size * page_table.shape[1]
    positions_BT = positions_BT.to(torch.int64).contiguous()
    threads, scratch_size = torch.get_num_threads(), operators.decode_scratch(slots, T * (H // G), K)
    scratch = torch.empty(threads * scratch_size)
    tensors = q_BTHK, k_cache, v_cache, positions_BT, page_table, y_BTHK, scratch
    strides = [stride for t in (q_BTHK, k_cache, v_cache) for stride in t.stride()[:3]]
    operators.decode_attention(
        *map(address, tensors), scratch_size, B, T, slots, H, G, K, window or slots, page_size, table_stride,
        *strides, threads,
    )  # fmt: skip
    return y_BTHK


# --- registration: torch.compile sees one opaque operator with a known shape; it has no gradient ---


@custom_operator("lumi::decode_attention")
def _decode_attention_op(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    window: int | None = None,
    native: bool = False,
) -> Tensor:
    q, k_cache, v_cache = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k_cache, v_cache))
    if page_table is not None and page_table.stride(1) != 1:
        page_table = page_table.contiguous()
    if native:
        return native_decode_attention(q, k_cache, v_cache, positions, page_table, window)
    return decode_attention_launch(q, k_cache, v_cache, positions, page_table, window=window)


@_decode_attention_op.register_fake
def _(q: Tensor, *_: Any) -> Tensor:
    return q.new_empty(q.shape)


# --- the public function ---


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """Attend from T new tokens to the cache slots up to each one's own.

    Args:
        q: queries (B, T, H, K), already rotated, float32 / bfloat16 / float16, any strides. K is a multiple
            of 8, 8 <= K <= 256; it is padded to the next power of two, at least 16.
        k_cache: keys (B, S, G, K); with a page table (P, page_size, G, K). The new tokens' keys are already
            in their slots. Dtype and device of `q`, any strides; a last stride other than 1 costs a copy of
            the whole cache. A query sees the slots up to its own. Slots past the largest position of a row's
            queries are never read: they may hold anything, NaN too.
        v_cache: values, likewise.
        positions: (B, T) int64 or int32, the slot of each query, below S. Rows may stand at different
            positions. A query at a negative one sees nothing, and its result is zero.
        page_table: (B, max_pages) int32: slot s of row b is slot s % page_size of page page_table[b, s //
            page_size], and S is max_pages * page_size. page_size is a power of two, at least 16. Entries past
            a row's largest position are never read.
        window: a query sees its own slot and the window - 1 slots before it, at least 1; None: all before it.
            Slots and entries before the window of a row's first query are never read.

    Returns:
        y (B, T, H, K), dtype of `q`, contiguous. Not differentiable: for inference only.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit each other, or K, the page size or the window is
            none of the above.
        RuntimeError: when a gradient is asked for.

    Source: Dao et al. 2023, https://crfm.stanford.edu/2023/10/12/flashdecoding.html.
    """
    _check(q, k_cache, v_cache, positions, page_table, window)
    K = q.shape[3]
    if not 8 <= K <= MAX_K or K % 8:
        raise ValueError(f"K must be a multiple of 8 between 8 and {MAX_K}, got {K}")
    return _decode_attention_op(q, k_cache, v_cache, positions, page_table, window)


def decode_attention_native(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None = None,
    window: int | None = None,
) -> Tensor:
    """As `decode_attention`, in C++, with any K: float32 or bfloat16 on a CPU."""
    check_taken(q, k_cache, v_cache)
    _check(q, k_cache, v_cache, positions, page_table, window)
    return _decode_attention_op(q, k_cache, v_cache, positions, page_table, window, True)


def _check(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    positions: Tensor,
    page_table: Tensor | None,
    window: int | None,
) -> None:
    _check_shapes(q, k_cache, v_cache, positions, page_table, window)
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    if not q.dtype == k_cache.dtype == v_cache.dtype or q.dtype not in dtypes:
        raise ValueError(
            "q and the caches must be of one dtype, float32, bfloat16 or float16, "
            f"got {q.dtype}, {k_cache.dtype} and {v_cache.dtype}"
        )
    if positions.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"positions must be int64 or int32, got {positions.dtype}")
    devices = [t.device for t in (q, k_cache, v_cache, positions, page_table) if t is not None]
    if len(set(devices)) > 1:
        raise ValueError(
            "q, the caches, positions and page_table must be on one device, "
            f"got {', '.join(map(str, devices))}"
        )
