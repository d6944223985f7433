"""The output projection and the cross-entropy loss in one operator, with few rows of logits at a time.

    logits = hidden . weight^T,   lse_n = log sum_v exp(logits_n[v])
    loss = sum over n with target_n != -100 of   lse_n - logits_n[target_n] + z_loss * lse_n^2

    dlogits = softmax(logits) * (1 + 2 * z_loss * lse) - onehot(target)
    dhidden = dlogits . weight,   dweight = dlogits^T . hidden

The gradient of the sum needs one factor from upstream and nothing else. So the forward computes the gradients
chunk by chunk while the logits are at hand, and the backward only multiplies (Hsu et al. 2024, Liger Kernel,
https://arxiv.org/abs/2410.10989; Wijmans et al. 2024, https://arxiv.org/abs/2411.09009). z-loss: Chowdhery et
al. 2022, https://arxiv.org/abs/2204.02311.

Shape letters: N rows (B * T tokens), D model dim, V vocabulary, C rows of one chunk.
Precision: products in the dtype of `hidden`; softmax, loss and the sum of dweight over chunks in float32 (the
reference keeps float64 as float64). Logits are rounded to the dtype of `hidden` twice: once as logits, once
as their gradient.

Cost: three products per chunk, together 6 * N * D * V FLOPs, which is the floor. On top of them:
- The first product writes each logit. The kernel reads it twice and writes it once; the second read hits the
  L2 cache as far as rows fit there. The two other products read it.
- Every chunk after the first reads and writes dweight: 8 * V * D bytes. So a chunk has as many rows as
  LOGITS_BYTES allow, and never fewer than MIN_CHUNK_ROWS: 128 rows make 32 FLOPs per byte of dweight, and a
  GPU needs hundreds.
- A weight of another dtype than hidden is read and cast once: 6 * V * D bytes.
- The backward casts the float32 sum of a 16-bit weight's gradient: 6 * V * D bytes. It does not if one chunk
  holds all rows and the product itself is the gradient (`dweight_dtype`).
- Multiplying by the incoming gradient would read and write dweight once more: 8 * V * D bytes. A caller who
  knows that gradient before the forward passes it as `expected_dloss`. The forward then multiplies it into
  dlogits; the backward's kernels compare the two numbers on the GPU and return.
"""

import math
from functools import cache
from typing import Any, no_type_check

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.native import address, check_taken, cpu_operators
from lumi.kernels.optional_triton import tl, triton

IGNORE_INDEX = -100
# Logits of a chunk of the operator for CPUs: 512 rows of 32,768. A chunk of 16-bit products has more: what it
# adds to dweight is not part of a product.
NATIVE_LOGITS = {4: 2**24, 2: 2**26}
NATIVE_MIN_ROWS = 256  # every chunk reads and writes all of dweight
LOGITS_BYTES = 2**30  # of the one buffer for logits: 2048 rows of 262,144 16-bit logits
MIN_CHUNK_ROWS = 2048  # even if they take more than LOGITS_BYTES
_ROW_MULTIPLE = 128  # a matrix product's tile
_LOGITS_MULTIPLE = 64  # elements: each row of the buffer starts at a multiple of 128 bytes (256 in float32)
_MAX_WARPS = 32
_RESCALE_BLOCK = 4096
_INTERPRETER_PROGRAMS = 3  # few: in the interpreter's tests a program of _rescale_kernel takes several blocks


# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def linear_cross_entropy_reference(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Arguments, result and errors as `linear_cross_entropy`, in any floating dtype. Holds the logits of all
    rows."""
    check_operands(hidden_ND, weight_VD, targets_N)
    logits_NV = hidden_ND @ weight_VD.to(hidden_ND.dtype).T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    lse_N = logits_NV.logsumexp(dim=1)[targets_N != IGNORE_INDEX]
    loss = F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="sum")
    return loss + z_loss * lse_N.square().sum()


# --- what every implementation refuses ---


def check_operands(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor | None = None
) -> None:
    """Raises ValueError if shapes do not fit, targets are not int64, or the copy is of another dtype than
    hidden."""
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            "hidden and weight must have shapes (N, D) and (V, D), "
            f"got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape ({len(hidden_ND)},), "
            f"got {targets_N.dtype} of shape {tuple(targets_N.shape)}"
        )
    if copy_VD is not None and (copy_VD.shape, copy_VD.dtype) != (weight_VD.shape, hidden_ND.dtype):
        raise ValueError(
            f"copy must be {hidden_ND.dtype} of shape {tuple(weight_VD.shape)}, "
            f"got {copy_VD.dtype} of shape {tuple(copy_VD.shape)}"
        )


def check(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor | None = None) -> None:
    """Raises ValueError for what the compiled operators do not take."""
    check_operands(hidden_ND, weight_VD, targets_N, copy_VD)
    if len(weight_VD) == 0:
        raise ValueError(f"weight must have at least one row, got shape {tuple(weight_VD.shape)}")
    for name, tensor in (("hidden", hidden_ND), ("weight", weight_VD)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    for name, tensor in (("weight", weight_VD), ("targets", targets_N)):
        if tensor.device != hidden_ND.device:
            raise ValueError(
                f"{name} must be on the device of hidden, {hidden_ND.device}, got {tensor.device}"
            )


def check_numbers(z_loss: float, expected_dloss: float) -> None:
    """Raises ValueError if a number is out of range."""
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")
    if not 2**-100 < abs(expected_dloss) < 2**100:
        raise ValueError(f"expected_dloss must be between 2^-100 and 2^100 in size, got {expected_dloss}")


# --- Triton kernels: one row per program, walked twice in tiles of LANES x VECTOR neighbouring logits ---


@triton.jit
@no_type_check
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr, weights_ptr,
    stride_c,
    V, z_loss, dloss,
    IGNORE_INDEX: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # Loads and stores reach to stride_c, a multiple of 16: they are whole vectors even if V is odd. What lies
    # past V is masked here, and nothing reads it.
    row = tl.program_id(0).to(tl.int64)  # int64: C * V can exceed 2**31
    row_ptr = logits_ptr + row * stride_c
    target = tl.load(targets_ptr + row)
    offsets = tl.arange(0, LANES)[:, None] * VECTOR + tl.arange(0, VECTOR)[None, :]

    if target == IGNORE_INDEX:
        tl.store(losses_ptr + row, 0.0)
        if GRADIENT:
            for start in range(0, V, LANES * VECTOR):
                zeros = tl.zeros((LANES, VECTOR), dtype=logits_ptr.dtype.element_ty)
                tl.store(row_ptr + start + offsets, zeros, mask=start + offsets < stride_c)
    else:
        # Each lane has its own maximum and sum: that costs VECTOR + 1 exponentials per VECTOR logits, and
        # threads meet only once, after the loop. -3.4e38 and not -inf: exp(maxima - maxima) of a lane without
        # logits must be a number.
        maxima = tl.full((LANES,), -3.4e38, dtype=tl.float32)
        sums = tl.zeros((LANES,), dtype=tl.float32)
        in_range = (target >= 0) & (target < V)
        target_col = target.to(tl.int32)  # to be compared with every column
        x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(tl.float32)
        for start in range(0, V, LANES * VECTOR):
            cols = start + offsets
            x = tl.load(row_ptr + cols, mask=cols < stride_c, other=0.0).to(tl.float32)
            x = tl.where(cols < V, x, -float("inf"))
            new_maxima = tl.maximum(maxima, tl.max(x, axis=1))
            sums = sums * tl.exp(maxima - new_maxima) + tl.sum(tl.exp(x - new_maxima[:, None]), axis=1)
            maxima = new_maxima

        maximum = tl.max(maxima, axis=0)
        total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
        lse = maximum + tl.log(total)
        loss = tl.log(total) + (maximum - x_target) + z_loss * lse * lse
        # A target out of range becomes NaN: it must not pass unseen.
        tl.store(losses_ptr + row, tl.where(in_range, loss, float("nan")))

        if GRADIENT:
            if weights_ptr is not None:  # known when the kernel is compiled
                dloss *= tl.load(weights_ptr + row)
            scale = tl.where(in_range, dloss * (1.0 + 2.0 * z_loss * lse) / total, float("nan"))
            num_tiles = tl.cdiv(V, LANES * VECTOR)
            for tile in range(0, num_tiles):
                # Backwards: what was read last is still in the cache.
                cols = (num_tiles - 1 - tile) * (LANES * VECTOR) + offsets
                x = tl.load(row_ptr + cols, mask=cols < stride_c, other=0.0).to(tl.float32)
                dx = tl.exp(x - maximum) * scale
                dx = tl.where(cols == target_col, dx - dloss, dx)
                tl.store(row_ptr + cols, dx, mask=cols < stride_c)


@triton.jit
@no_type_check
def _rescale_kernel(gradient_ptr, dloss_ptr, expected_dloss, num_elements, BLOCK: tl.constexpr):
    dloss = tl.load(dloss_ptr)
    if dloss != expected_dloss:  # if they are equal, all this costs is a launch: the host never waits to know
        factor = dloss / expected_dloss
        program = tl.program_id(0).to(tl.int64)  # so `tile` and `offsets` are int64: V * D can exceed 2**31
        for tile in range(program, tl.cdiv(num_elements, BLOCK), tl.num_programs(0)):
            offsets = tile * BLOCK + tl.arange(0, BLOCK)
            gradient = tl.load(gradient_ptr + offsets, mask=offsets < num_elements, other=0.0).to(tl.float32)
            tl.store(gradient_ptr + offsets, gradient * factor, mask=offsets < num_elements)


# --- launchers: allocate, pick block sizes, launch. Never autograd. ---


def tile_config(V: int, element_size: int) -> dict[str, int]:
    """LANES, VECTOR and num_warps for rows of V logits of `element_size` bytes: each thread makes two 16-byte
    accesses per tile.

    Wider rows get more warps. Fewer rows are then under way, and the cache keeps more of each for the second
    walk."""
    num_warps = min(max(triton.next_power_of_2(V) // 2048, 4), _MAX_WARPS)
    return {"LANES": 2 * 32 * num_warps, "VECTOR": 16 // element_size, "num_warps": num_warps}


def rescale_config() -> dict[str, int]:
    """BLOCK and num_warps of `_rescale_kernel`."""
    return {"BLOCK": _RESCALE_BLOCK, "num_warps": 8}


def triton_chunk_rows(N: int, V: int, element_size: int) -> int:
    """Rows of a chunk of the Triton operator.

    N is cut into as few chunks as LOGITS_BYTES and MIN_CHUNK_ROWS allow, all of nearly one size.
    """
    num_chunks = max(triton.cdiv(N, _most_rows(V, element_size)), 1)
    rows = triton.cdiv(triton.cdiv(N, num_chunks), _ROW_MULTIPLE) * _ROW_MULTIPLE
    return min(rows, N)


def _most_rows(V: int, element_size: int) -> int:
    return max(LOGITS_BYTES // (_padded(V) * element_size) // _ROW_MULTIPLE * _ROW_MULTIPLE, MIN_CHUNK_ROWS)


def dweight_dtype(N: int, V: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """The dtype that the forward sums dweight in: float32.

    It is the weight's own if that is the dtype of hidden, is not float16, and one chunk holds all rows: then
    the product itself yields the gradient, rounded once. A float16 weight has to wait for the incoming
    gradient: its sum may be out of range."""
    direct = weight_dtype == dtype != torch.float16 and _most_rows(V, dtype.itemsize) >= N
    return weight_dtype if direct else torch.float32


def workspace_bytes(
    N: int,
    D: int,
    V: int,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    needs_dhidden: bool = True,
    needs_dweight: bool = True,
    device_type: str = "cuda",
    has_copy: bool = False,
) -> int:
    """The most that `linear_cross_entropy` allocates, in bytes, gradients included.

    Backward adds V * D elements of the weight's dtype if that is not `dweight_dtype`.

    Args:
        N, D, V: rows, model dim, vocabulary.
        dtype, weight_dtype: of hidden and of weight.
        needs_dhidden, needs_dweight: which gradients are wanted.
        device_type: "cuda", or "cpu" for Triton's interpreter. There, dweight of 16-bit products needs
            float32 copies of the factors.
        has_copy: the caller has the weight in `dtype`.

    Returns:
        bytes of one chunk's logits, the cast weight, dhidden, dweight and the losses. The allocator's
        rounding and the workspace of cuBLAS are not counted.
    """
    size, rows = dtype.itemsize, triton_chunk_rows(N, V, dtype.itemsize)
    total = rows * _padded(V) * size + 4 * N + 4
    if weight_dtype != dtype and not has_copy:
        total += V * D * size
    if needs_dhidden:
        total += N * D * size
    if needs_dweight:
        sum_dtype = dweight_dtype(N, V, dtype, weight_dtype)
        total += V * D * sum_dtype.itemsize
        if device_type == "cpu" and dtype != sum_dtype:
            total += 4 * rows * (V + D)
    return total


def _padded(V: int) -> int:
    return triton.cdiv(V, _LOGITS_MULTIPLE) * _LOGITS_MULTIPLE


def linear_cross_entropy_fwd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    weights_N: Tensor | None = None,
    copy_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns losses_N in float32, dhidden_ND in hidden's dtype and dweight_VD in `dweight_dtype`.

    Both gradients are multiplied by `expected_dloss`. One that is not needed is empty, of shape (0,).
    `weights_N` (float32) are factors of each row's gradient; the losses are without them.
    """
    N, V = len(hidden_ND), len(weight_VD)
    weight = weight_VD.to(hidden_ND.dtype) if copy_VD is None else copy_VD
    targets_N = targets_N.contiguous()
    rows_at_once = triton_chunk_rows(N, V, hidden_ND.element_size())
    logits = torch.empty(rows_at_once, _padded(V), dtype=hidden_ND.dtype, device=hidden_ND.device)
    losses_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
    dhidden, dweight = _empty_gradients(hidden_ND, weight_VD, needs_dhidden, needs_dweight)
    if N == 0:
        return losses_N, dhidden, dweight.zero_()
    for start in range(0, N, rows_at_once):
        rows = slice(start, min(start + rows_at_once, N))
        logits_CV = torch.mm(hidden_ND[rows], weight.T, out=logits[: rows.stop - start, :V])
        weights_C = None if weights_N is None else weights_N[rows]
        needs_any = needs_dhidden or needs_dweight
        _rewrite(logits_CV, targets_N[rows], losses_N[rows], weights_C, z_loss, expected_dloss, needs_any)
        if needs_dhidden:
            torch.mm(logits_CV, weight, out=dhidden[rows])
        if needs_dweight:
            _accumulate(dweight, logits_CV, hidden_ND[rows], first=start == 0)
    return losses_N, dhidden, dweight


def _empty_gradients(
    hidden_ND: Tensor, weight_VD: Tensor, needs_dhidden: bool, needs_dweight: bool
) -> tuple[Tensor, Tensor]:
    sum_dtype = dweight_dtype(len(hidden_ND), len(weight_VD), hidden_ND.dtype, weight_VD.dtype)
    dhidden_shape = hidden_ND.shape if needs_dhidden else (0,)
    dweight_shape = weight_VD.shape if needs_dweight else (0,)
    return (
        torch.empty(dhidden_shape, dtype=hidden_ND.dtype, device=hidden_ND.device),
        torch.empty(dweight_shape, dtype=sum_dtype, device=hidden_ND.device),
    )


def _rewrite(
    logits_CV: Tensor,
    targets_C: Tensor,
    losses_C: Tensor,
    weights_C: Tensor | None,
    z_loss: float,
    dloss: float,
    gradient: bool,
) -> None:
    """Fills losses_C and, if `gradient`, turns logits_CV into their gradient times `dloss` and the row's
    weight, in place."""
    C, V = logits_CV.shape
    config = tile_config(V, logits_CV.element_size())
    with torch.cuda.device_of(logits_CV):  # Triton launches on the current device: it need not be the logits'
        _cross_entropy_kernel[(C,)](
            logits_CV, targets_C, losses_C, weights_C, logits_CV.stride(0), V, z_loss, dloss,
            IGNORE_INDEX=IGNORE_INDEX, GRADIENT=gradient, **config,
        )  # fmt: skip


def _accumulate(dweight_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor, first: bool) -> None:
    """dweight += dlogits^T . hidden; the first chunk overwrites.

    Only CUDA has a product of 16-bit factors with a float32 result. Elsewhere the factors are widened.
    """
    factors = (dlogits_CV.T, hidden_CD)
    if dlogits_CV.dtype == dweight_VD.dtype:
        torch.mm(*factors, out=dweight_VD) if first else torch.addmm(dweight_VD, *factors, out=dweight_VD)
    elif dweight_VD.device.type == "cuda" and first:
        torch.mm(*factors, torch.float32, out=dweight_VD)
    elif dweight_VD.device.type == "cuda":
        torch.addmm(dweight_VD, *factors, torch.float32, out=dweight_VD)
    else:
        wide = (factor.float() for factor in factors)
        torch.addmm(dweight_VD, *wide, beta=0 if first else 1, out=dweight_VD)


@cache
def _max_programs(device: torch.device) -> int:
    """The most programs of `_rescale_kernel`: as many as are resident together, so that returning at once
    costs nothing."""
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


def rescale(gradient: Tensor, dloss: Tensor, expected_dloss: float) -> None:
    """gradient *= dloss / expected_dloss, in place; contiguous, any float dtype. Moves no data if they are
    equal."""
    num_elements, config = gradient.numel(), rescale_config()
    num_programs = min(triton.cdiv(num_elements, config["BLOCK"]), _max_programs(gradient.device))
    if num_programs:
        with torch.cuda.device_of(gradient):
            _rescale_kernel[(num_programs,)](gradient, dloss, expected_dloss, num_elements, **config)


# --- C++ for CPUs: products by torch, what is between them by csrc/cpu/cross_entropy.h ---


def native_chunk_rows(N: int, V: int, element_size: int) -> int:
    """Rows of a chunk of the operator for CPUs."""
    rows = max(NATIVE_LOGITS[element_size] // V, NATIVE_MIN_ROWS)
    return max(triton.cdiv(N, triton.cdiv(max(N, 1), rows)), 1)


def native_workspace_bytes(
    N: int, D: int, V: int, dtype: torch.dtype, needs_dweight: bool = True, has_copy: bool = False
) -> int:
    """The most that `linear_cross_entropy_native` allocates, in bytes, gradients included. Arguments as
    `workspace_bytes`."""
    size, rows = dtype.itemsize, native_chunk_rows(N, V, dtype.itemsize)
    # Of the weight, and of a chunk's dweight.
    casts = 0 if size == 4 else (1 if has_copy else 2) * V * D * size
    return rows * V * size + casts + 2 * N * D * size + (4 * V * D if needs_dweight else 0)


def native_linear_cross_entropy_fwd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    weights_N: Tensor | None = None,
    copy_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """As `linear_cross_entropy_fwd`; dweight_VD is float32. Rows without a target take part in no product."""
    counted = (targets_N != IGNORE_INDEX).nonzero()[:, 0]
    if len(counted) and not 0 <= targets_N[counted].min() <= targets_N[counted].max() < len(weight_VD):
        raise IndexError(f"targets must be below {len(weight_VD)} or {IGNORE_INDEX}, got others")
    all_counted = len(counted) == len(targets_N)
    hidden_MD, targets_M = (hidden_ND, targets_N) if all_counted else (hidden_ND[counted], targets_N[counted])
    M, V, dtype = len(hidden_MD), len(weight_VD), hidden_ND.dtype
    weights_M = weights_N if weights_N is None or all_counted else weights_N[counted]
    operators = cpu_operators(dtype)
    weight = weight_VD.to(dtype) if copy_VD is None else copy_VD
    targets_M, losses_M = targets_M.contiguous(), torch.empty(M)
    dhidden_MD = torch.empty(hidden_MD.shape if needs_dhidden else (0,), dtype=dtype)
    dweight_VD = torch.zeros(weight_VD.shape if needs_dweight else (0,))
    # The transpose of a chunk's logits: at these shapes products with it are a tenth faster.
    columns_at_once = native_chunk_rows(M, V, dtype.itemsize)
    buffer = torch.empty(V * columns_at_once, dtype=dtype)
    scratch = torch.empty(operators.cross_entropy_scratch(V, columns_at_once))
    for start in range(0, M, columns_at_once):
        rows = slice(start, min(start + columns_at_once, M))
        C, hidden_CD = rows.stop - start, hidden_MD[rows]
        logits_VC = torch.mm(weight, hidden_CD.T, out=buffer[: V * C].view(V, C))
        weights_C = None if weights_M is None else weights_M[rows]
        operators.cross_entropy(
            *map(address, (logits_VC, targets_M[rows], losses_M[rows], weights_C, scratch)), V, C,
            z_loss, expected_dloss, needs_dhidden or needs_dweight, torch.get_num_threads(),
        )  # fmt: skip
        if needs_dhidden:
            torch.mm(logits_VC.T, weight, out=dhidden_MD[rows])
        if needs_dweight and dtype == torch.float32:
            dweight_VD.addmm_(logits_VC, hidden_CD)
        elif needs_dweight:
            dweight_VD += logits_VC @ hidden_CD
    if needs_dhidden and not all_counted:
        dhidden_MD = torch.zeros_like(hidden_ND).index_copy_(0, counted, dhidden_MD)
    if not all_counted:
        losses_M = torch.zeros(len(targets_N)).index_copy_(0, counted, losses_M)
    return losses_M, dhidden_MD, dweight_VD


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@torch.library.custom_op("lumi::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    native: bool = False,
    copy_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    launch = native_linear_cross_entropy_fwd if native else linear_cross_entropy_fwd
    losses_N, dhidden, dweight = launch(
        hidden_ND, weight_VD, targets_N, z_loss, expected_dloss, needs_dhidden, needs_dweight, None, copy_VD
    )
    return losses_N.sum(), dhidden, dweight


@torch.library.custom_op("lumi::linear_cross_entropy_rescale", mutates_args=("gradient",))
def _rescale_op(gradient: Tensor, dloss: Tensor, expected_dloss: float, native: bool = False) -> None:
    if not native:
        rescale(gradient, dloss, expected_dloss)
    elif dloss.item() != expected_dloss:
        gradient *= dloss / expected_dloss


@_linear_cross_entropy_op.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    native: bool = False,
    copy_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden, dweight = _empty_gradients(hidden_ND, weight_VD, needs_dhidden, needs_dweight)
    dweight = dweight.float() if native else dweight
    return hidden_ND.new_empty((), dtype=torch.float32), dhidden, dweight


@_rescale_op.register_fake
def _(gradient: Tensor, dloss: Tensor, expected_dloss: float, native: bool = False) -> None:
    return None


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, weight_VD, _, _, ctx.expected_dloss, ctx.needs_dhidden, ctx.needs_dweight, ctx.native, _ = inputs
    _, dhidden, dweight = output
    ctx.weight_dtype = weight_VD.dtype
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)  # or autograd would fill a (V, D) with zeros, as the gradient of dweight
    ctx.save_for_backward(dhidden, dweight)


def _backward(ctx: Any, dloss: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    if dloss is None:
        return (None,) * 9
    if ctx.needs_dhidden:
        _rescale_op(dhidden, dloss, ctx.expected_dloss, ctx.native)
    if ctx.needs_dweight:
        _rescale_op(dweight, dloss, ctx.expected_dloss, ctx.native)
    return (
        dhidden if ctx.needs_dhidden else None,
        dweight.to(ctx.weight_dtype) if ctx.needs_dweight else None,
        *(None,) * 7,
    )


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float = 0.0,
    expected_dloss: float = 1.0,
    copy_VD: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropy losses of all rows with a target. Only one chunk of rows has its logits in
    memory at a time.

    Args:
        hidden_ND: final hidden states (N, D), float32 / bfloat16 / float16.
        weight_VD: output projection (V, D), one of the same dtypes, 1 <= V. It is cast to the dtype of
            `hidden_ND` once, unless there is a copy. Its gradient is summed in float32 and has its own dtype.
        targets_N: (N,) int64 in [0, V), or -100 for a row that does not count.
        z_loss: weight of lse^2, at least 0; 0 leaves it out.
        expected_dloss: the gradient that the loss will get in backward: f, if the caller runs `(loss *
            f).backward()`. Backward then moves no data. (Inside `torch.compile` it does: compile copies what
            backward changes.) Any other gradient gives the right result too, and costs a read and a write of
            both gradients: 8 * V * D bytes and 2 * N * D elements. The factor is multiplied in before the
            gradient of the logits is rounded to the dtype of hidden. So with float16 this is the place for
            loss scaling. 2^-100 to 2^100 in size.
        copy_VD: the weight in the dtype of `hidden_ND`, where the caller has it. It has no gradient.

    Returns:
        scalar, float32, in nats, not multiplied by `expected_dloss`. NaN if a target is out of range. Divide
        by the number of counted targets of the whole step. Differentiable once, in `hidden_ND` and
        `weight_VD`. Backward runs once: it scales the gradients that the forward left, in place. Extra
        memory: `workspace_bytes`.

    Raises:
        ValueError: if shapes do not fit, devices differ, a dtype is none of the three, targets are not int64,
            or a number is out of range.

    Source: Hsu et al. 2024, https://arxiv.org/abs/2410.10989.
    """
    check(hidden_ND, weight_VD, targets_N, copy_VD)
    check_numbers(z_loss, expected_dloss)
    return _apply(hidden_ND, weight_VD, targets_N, z_loss, expected_dloss, copy_VD, native=False)


def linear_cross_entropy_native(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float = 0.0,
    expected_dloss: float = 1.0,
    copy_VD: Tensor | None = None,
) -> Tensor:
    """As `linear_cross_entropy`, on a CPU: hidden is float32 or bfloat16.

    Extra memory: `native_workspace_bytes`.

    Raises:
        ValueError: as `linear_cross_entropy`.
        IndexError: if a target is out of range.
    """
    check_taken(hidden_ND)
    check(hidden_ND, weight_VD, targets_N, copy_VD)
    check_numbers(z_loss, expected_dloss)
    return _apply(hidden_ND, weight_VD, targets_N, z_loss, expected_dloss, copy_VD, native=True)


def _apply(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    expected_dloss: float,
    copy_VD: Tensor | None,
    native: bool,
) -> Tensor:
    needs = [torch.is_grad_enabled() and t.requires_grad for t in (hidden_ND, weight_VD)]
    loss, _, _ = _linear_cross_entropy_op(
        hidden_ND, weight_VD, targets_N, float(z_loss), float(expected_dloss), *needs, native, copy_VD
    )
    return loss
