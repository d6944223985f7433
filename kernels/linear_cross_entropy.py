"""The output projection and the cross-entropy loss in one, so that the logits of all tokens never exist at once.

    x = softcap * tanh(raw / softcap) with a softcap, else raw,   raw = hidden . weight^T
    loss = sum over n with target_n != -100 of lse_n - x_n[target_n] + z_loss * lse_n^2,   lse_n = log sum_v exp(x_n[v])

    dx = softmax(x) * (1 + 2 * z_loss * lse) - onehot(target),   draw = dx * (1 - (x / softcap)^2)
    dhidden = draw . weight,   dweight = draw^T . hidden

The gradient of the sum needs nothing from upstream but one factor, so the forward computes it chunk by chunk while the logits are at
hand, and the backward only multiplies (Hsu et al. 2024, Liger Kernel, https://arxiv.org/abs/2410.10989; Wijmans et al. 2024,
https://arxiv.org/abs/2411.09009). Soft-capping: Gemma 2, https://arxiv.org/abs/2408.00118. z-loss: Chowdhery et al. 2022,
https://arxiv.org/abs/2204.02311.

Shape letters: N rows (B * T tokens), D model dim, V vocabulary, C rows of one chunk.
Precision: products in the dtype of `hidden`; softmax, loss and the sum of dweight over chunks in float32 (the reference keeps float64 as
float64). The logits are rounded to the dtype of `hidden` once as logits and once as their gradient.

Cost of the Triton operator: three products per chunk, together 6 * N * D * V FLOPs, which is the floor. Beside them, each logit is
written by the first product, read twice and written once by the kernel between (the second time from the L2 cache, as far as rows fit
there) and read by the two other products; and every chunk after the first reads and writes dweight, 8 * V * D bytes. That is why a
chunk has as many rows as LOGITS_BYTES allow, never below MIN_CHUNK_ROWS: 128 rows make 32 FLOPs per byte of dweight, where a GPU needs
hundreds. A weight of another dtype than hidden is read and cast once (6 * V * D bytes); the float32 sum of a 16-bit weight's gradient is
cast in backward (6 * V * D), unless all rows are one chunk and the product itself is the gradient (`dweight_dtype`).
Multiplying by the incoming gradient would read and write dweight once more, another 8 * V * D bytes. A caller who knows that gradient
before the forward passes it as `expected_dloss`: it is then part of draw, and the backward's kernels compare, on the GPU, and return.
"""

import math
from collections.abc import Iterator
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.optional_triton import tl, triton
from lumi.kernels.tanh import tanh

IGNORE_INDEX = -100
LOGITS_BYTES = 2**30  # of the one buffer for logits: 2048 rows of 262,144 16-bit logits
MIN_CHUNK_ROWS = 2048  # even where they take more than LOGITS_BYTES
_ROW_MULTIPLE = 128  # a matrix product's tile
_LOGITS_MULTIPLE = (
    64  # elements: rows of the buffer begin at a multiple of 128 bytes (256 in float32), whatever V is
)
_MAX_WARPS = 32
_RESCALE_BLOCK = 4096
_INTERPRETER_PROGRAMS = (
    3  # few, so that the interpreter's tests walk the loop of _rescale_kernel more than once
)
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


# --- reference: the definition. Any device, any dtype. ---


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows of the reference whose logits exist at once: as many as fit a CPU's cache (8 MB; measured fastest) or a modest share of a GPU
    (512 MB), in float32; at least 256, since every chunk adds a whole (V, D) to dweight."""
    elements = 2**21 if device_type == "cpu" else 2**27
    return max(elements // vocab_size, 256)


def _chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    rows = chunk_rows(vocab_size, device.type)
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def _log_probs(hidden_CD: Tensor, weight_VD: Tensor, wide: torch.dtype) -> Tensor:
    return F.log_softmax(hidden_CD @ weight_VD.T, dim=-1, dtype=wide)


def _losses_and_dlogits(
    raw_CV: Tensor, targets_C: Tensor, wide: torch.dtype, z_loss: float, softcap: float | None
) -> tuple[Tensor, Tensor]:
    """Of one chunk: losses_C1 and draw_CV, both in `wide`; zero where the target is -100."""
    counted_C1 = (targets_C != IGNORE_INDEX)[:, None]
    index_C1 = torch.where(counted_C1, targets_C[:, None], 0)
    x_CV = raw_CV if softcap is None else softcap * torch.tanh(raw_CV.to(wide) / softcap)
    log_probs_CV = F.log_softmax(x_CV, dim=-1, dtype=wide)
    losses_C1 = -log_probs_CV.gather(1, index_C1)
    lse_C1 = x_CV.gather(1, index_C1).to(wide) + losses_C1
    dlogits_CV = log_probs_CV.exp_()
    if z_loss:
        losses_C1 += z_loss * lse_C1.square()
        dlogits_CV *= 1 + 2 * z_loss * lse_C1
    dlogits_CV.scatter_add_(1, index_C1, -torch.ones_like(lse_C1))
    if softcap is not None:
        dlogits_CV *= 1 - (x_CV / softcap).square()
    return losses_C1.where(counted_C1, 0), dlogits_CV.masked_fill_(~counted_C1, 0)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        z_loss: float,
        softcap: float | None,
        expected_dloss: float,
    ) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(hidden_ND.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows in _chunks(*_sizes(hidden_ND, weight_VD)):
            hidden_CD = hidden_ND[rows]
            losses_C1, dlogits_CV = _losses_and_dlogits(
                hidden_CD @ weight.T, targets_N[rows], wide, z_loss, softcap
            )
            loss += losses_C1.sum()
            if expected_dloss != 1:
                dlogits_CV *= expected_dloss
            dlogits_CV = dlogits_CV.to(weight.dtype)
            if dhidden_ND is not None:
                dhidden_ND[rows] = dlogits_CV @ weight
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ hidden_CD
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype, ctx.expected_dloss = weight_VD.dtype, expected_dloss
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor):
        dhidden_ND, dweight_VD = ctx.saved_tensors
        factor = dloss / ctx.expected_dloss
        return (
            None if dhidden_ND is None else (dhidden_ND * factor).to(dhidden_ND.dtype),
            None if dweight_VD is None else (dweight_VD * factor).to(ctx.weight_dtype),
            *(None,) * 4,
        )


def linear_cross_entropy_reference(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
    expected_dloss: float = 1.0,
) -> Tensor:
    """Sum of the cross-entropy losses of all rows with a target.

    Args:
        hidden_ND: final hidden states (N, D), floating.
        weight_VD: output projection (V, D); cast to the dtype of hidden for the products, its gradient keeps its own dtype.
        targets_N: (N,) int64 in [0, V), or -100 for a row that does not count.
        z_loss: weight of lse^2, at least 0; 0 leaves it out.
        softcap: bound of the logits, above 0; None leaves them as they are.
        expected_dloss: the gradient that the loss will get in backward; any other is right as well. It is multiplied in before the
            gradient of the logits is rounded to the dtype of hidden: with float16, the place for loss scaling. Finite, not 0.

    Returns:
        scalar, float32 (float64 for float64 hidden), in nats. Divide by the number of counted targets of the whole step.

    Raises:
        ValueError: if the shapes do not fit, targets are not int64, or a number is out of range.
        IndexError: on CPU, if a target is out of range; on CUDA, a device-side assertion.
    """
    _check(hidden_ND, weight_VD, targets_N)
    _check_numbers(z_loss, softcap, expected_dloss)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_loss, softcap, expected_dloss)


@torch.no_grad()
def cross_entropy_per_token_reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The loss of every row (N,) float32 (float64 for float64 hidden) in nats, 0 where the target is -100; no gradient.

    Arguments and errors as `linear_cross_entropy_reference`.
    """
    _check(hidden_ND, weight_VD, targets_N)
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    weight = weight_VD.to(hidden_ND.dtype)
    losses_N = torch.zeros(len(targets_N), dtype=wide, device=hidden_ND.device)
    for rows in _chunks(*_sizes(hidden_ND, weight_VD)):
        log_probs_CV = _log_probs(hidden_ND[rows], weight, wide)
        losses_N[rows] = F.nll_loss(
            log_probs_CV, targets_N[rows], ignore_index=IGNORE_INDEX, reduction="none"
        )
    return losses_N


def _sizes(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[int, int, torch.device]:
    return len(hidden_ND), len(weight_VD), hidden_ND.device


def _check(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(
            f"hidden and weight must have shapes (N, D) and (V, D), got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}"
        )
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(
            f"targets must be int64 of shape ({len(hidden_ND)},), got {targets_N.dtype} of shape {tuple(targets_N.shape)}"
        )


def _check_numbers(z_loss: float, softcap: float | None, expected_dloss: float) -> None:
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"z_loss must be finite and at least 0, got {z_loss}")
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap must be None or finite and above 0, got {softcap}")
    if not 2**-100 < abs(expected_dloss) < 2**100:
        raise ValueError(f"expected_dloss must be between 2^-100 and 2^100 in size, got {expected_dloss}")


# --- Triton kernels: one row per program, walked twice in tiles of LANES x VECTOR neighbouring logits ---


@triton.jit
def _cross_entropy_kernel(
    logits_ptr, targets_ptr, losses_ptr,
    stride_c,
    V, z_loss, softcap, dloss,
    IGNORE_INDEX: tl.constexpr, HAS_SOFTCAP: tl.constexpr, GRADIENT: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr,
):  # fmt: skip
    # Loads and stores reach to stride_c, a multiple of 16, and so are whole vectors even if V is odd; what lies past V is masked here
    # and read by no one.
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
        # Every lane has a maximum and a sum of its own: VECTOR + 1 exponentials per VECTOR logits, and threads meet once, after the loop.
        maxima = tl.full(
            (LANES,), -3.4e38, dtype=tl.float32
        )  # not -inf: exp(maxima - maxima) of a lane without logits must be a number
        sums = tl.zeros((LANES,), dtype=tl.float32)
        in_range = (target >= 0) & (target < V)
        target_col = target.to(tl.int32)  # to be compared with every column
        x_target = tl.load(row_ptr + target, mask=in_range, other=0.0).to(tl.float32)
        if HAS_SOFTCAP:
            x_target = softcap * tanh(x_target / softcap)
        for start in range(0, V, LANES * VECTOR):
            cols = start + offsets
            x = tl.load(row_ptr + cols, mask=cols < stride_c, other=0.0).to(tl.float32)
            if HAS_SOFTCAP:
                x = softcap * tanh(x / softcap)
            x = tl.where(cols < V, x, -float("inf"))
            new_maxima = tl.maximum(maxima, tl.max(x, axis=1))
            sums = sums * tl.exp(maxima - new_maxima) + tl.sum(tl.exp(x - new_maxima[:, None]), axis=1)
            maxima = new_maxima

        maximum = tl.max(maxima, axis=0)
        total = tl.sum(sums * tl.exp(maxima - maximum), axis=0)
        lse = maximum + tl.log(total)
        loss = tl.log(total) + (maximum - x_target) + z_loss * lse * lse
        tl.store(
            losses_ptr + row, tl.where(in_range, loss, float("nan"))
        )  # a bad target must not pass unseen

        if GRADIENT:
            scale = tl.where(in_range, dloss * (1.0 + 2.0 * z_loss * lse) / total, float("nan"))
            num_tiles = tl.cdiv(V, LANES * VECTOR)
            for tile in range(0, num_tiles):
                cols = (num_tiles - 1 - tile) * (
                    LANES * VECTOR
                ) + offsets  # backwards: what was read last is still in the cache
                x = tl.load(row_ptr + cols, mask=cols < stride_c, other=0.0).to(tl.float32)
                slope = 1.0
                if HAS_SOFTCAP:
                    capped = tanh(x / softcap)
                    x = softcap * capped
                    slope = 1.0 - capped * capped
                dx = tl.exp(x - maximum) * scale
                dx = tl.where(cols == target_col, dx - dloss, dx)
                tl.store(row_ptr + cols, dx * slope, mask=cols < stride_c)


@triton.jit
def _rescale_kernel(gradient_ptr, dloss_ptr, expected_dloss, num_elements, BLOCK: tl.constexpr):
    dloss = tl.load(dloss_ptr)
    if dloss != expected_dloss:  # else all this cost is a launch; the host never waits to know
        factor = dloss / expected_dloss
        program = tl.program_id(0).to(tl.int64)  # and with it `tile` and `offsets`: V * D can exceed 2**31
        for tile in range(program, tl.cdiv(num_elements, BLOCK), tl.num_programs(0)):
            offsets = tile * BLOCK + tl.arange(0, BLOCK)
            gradient = tl.load(gradient_ptr + offsets, mask=offsets < num_elements, other=0.0).to(tl.float32)
            tl.store(gradient_ptr + offsets, gradient * factor, mask=offsets < num_elements)


# --- launchers: allocate, pick block sizes, launch. Never autograd. ---


def tile_config(V: int, element_size: int) -> dict[str, int]:
    """LANES, VECTOR and num_warps for rows of V logits of `element_size` bytes: two 16-byte accesses of each thread per tile. The wider
    the row, the more warps share it: the fewer rows are then under way, the more of them the cache keeps for the second walk."""
    num_warps = min(max(triton.next_power_of_2(V) // 2048, 4), _MAX_WARPS)
    return {"LANES": 2 * 32 * num_warps, "VECTOR": 16 // element_size, "num_warps": num_warps}


def rescale_config() -> dict[str, int]:
    """BLOCK and num_warps of `_rescale_kernel`."""
    return {"BLOCK": _RESCALE_BLOCK, "num_warps": 8}


def triton_chunk_rows(N: int, V: int, element_size: int) -> int:
    """Rows of a chunk of the Triton operator: N in as few chunks as LOGITS_BYTES and MIN_CHUNK_ROWS allow, all of nearly one size."""
    num_chunks = max(triton.cdiv(N, _most_rows(V, element_size)), 1)
    rows = triton.cdiv(triton.cdiv(N, num_chunks), _ROW_MULTIPLE) * _ROW_MULTIPLE
    return min(rows, N)


def _most_rows(V: int, element_size: int) -> int:
    return max(LOGITS_BYTES // (_padded(V) * element_size) // _ROW_MULTIPLE * _ROW_MULTIPLE, MIN_CHUNK_ROWS)


def dweight_dtype(N: int, V: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> torch.dtype:
    """What the forward sums dweight in: float32, but for one chunk and a bfloat16 weight the product itself yields what is wanted, rounded
    once. (A float16 weight has to wait for the incoming gradient: the sum may be out of its range.)"""
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
) -> int:
    """What `linear_cross_entropy` allocates at most, in bytes, gradients included. Backward adds V * D elements of the weight's dtype where
    that is not `dweight_dtype`.

    Args:
        N, D, V: rows, model dim, vocabulary.
        dtype, weight_dtype: of hidden and of weight.
        needs_dhidden, needs_dweight: which gradients are wanted.
        device_type: "cuda", or "cpu" for Triton's interpreter, where dweight of 16-bit products needs float32 copies of their factors.

    Returns:
        bytes of the logits of one chunk, the cast weight, dhidden, dweight and the losses; not the allocator's rounding nor the
        workspace of cuBLAS.
    """
    size, rows = dtype.itemsize, triton_chunk_rows(N, V, dtype.itemsize)
    parts = [rows * _padded(V) * size, 4 * N + 4]
    parts += [V * D * size] if weight_dtype != dtype else []
    parts += [N * D * size] if needs_dhidden else []
    if needs_dweight:
        sum_dtype = dweight_dtype(N, V, dtype, weight_dtype)
        parts += [V * D * sum_dtype.itemsize] + [4 * rows * (V + D)] * (
            device_type == "cpu" and dtype != sum_dtype
        )
    return sum(parts)


def _padded(V: int) -> int:
    return triton.cdiv(V, _LOGITS_MULTIPLE) * _LOGITS_MULTIPLE


def linear_cross_entropy_fwd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    softcap: float | None,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the loss, dhidden_ND in hidden's dtype and dweight_VD in `dweight_dtype`, both times `expected_dloss`; (0,) if not needed."""
    (N, D), V = hidden_ND.shape, len(weight_VD)
    weight = weight_VD.to(hidden_ND.dtype)
    rows_at_once = triton_chunk_rows(N, V, hidden_ND.element_size())
    logits = torch.empty(rows_at_once, _padded(V), dtype=hidden_ND.dtype, device=hidden_ND.device)
    losses_N = torch.empty(N, dtype=torch.float32, device=hidden_ND.device)
    dhidden = torch.empty((N, D) if needs_dhidden else 0, dtype=hidden_ND.dtype, device=hidden_ND.device)
    sum_dtype = dweight_dtype(N, V, hidden_ND.dtype, weight_VD.dtype)
    dweight = torch.empty((V, D) if needs_dweight else 0, dtype=sum_dtype, device=hidden_ND.device)
    if N == 0:
        return losses_N.sum(), dhidden, dweight.zero_()
    for start in range(0, N, rows_at_once):
        rows = slice(start, min(start + rows_at_once, N))
        logits_CV = torch.mm(hidden_ND[rows], weight.T, out=logits[: rows.stop - start, :V])
        _rewrite(
            logits_CV,
            targets_N[rows],
            losses_N[rows],
            z_loss,
            softcap,
            expected_dloss,
            needs_dhidden or needs_dweight,
        )
        if needs_dhidden:
            torch.mm(logits_CV, weight, out=dhidden[rows])
        if needs_dweight:
            _accumulate(dweight, logits_CV, hidden_ND[rows], first=start == 0)
    return losses_N.sum(), dhidden, dweight


def _rewrite(
    logits_CV: Tensor,
    targets_C: Tensor,
    losses_C: Tensor,
    z_loss: float,
    softcap: float | None,
    dloss: float,
    gradient: bool,
) -> None:
    """Fills losses_C and turns logits_CV into their gradient times `dloss`, in place; without `gradient` it leaves them."""
    C, V = logits_CV.shape
    flags = {"IGNORE_INDEX": IGNORE_INDEX, "HAS_SOFTCAP": softcap is not None, "GRADIENT": gradient}
    scalars = (z_loss, 1.0 if softcap is None else softcap, dloss)
    with torch.cuda.device_of(
        logits_CV
    ):  # Triton launches on the current device, which need not be that of the logits
        _cross_entropy_kernel[(C,)](
            logits_CV,
            targets_C,
            losses_C,
            logits_CV.stride(0),
            V,
            *scalars,
            **flags,
            **tile_config(V, logits_CV.element_size()),
        )


def _accumulate(dweight_VD: Tensor, dlogits_CV: Tensor, hidden_CD: Tensor, first: bool) -> None:
    """dweight += dlogits^T . hidden, the first chunk overwrites. 16-bit factors of a float32 product exist on CUDA only: elsewhere they
    are widened."""
    factors = (dlogits_CV.T, hidden_CD)
    if dlogits_CV.dtype == dweight_VD.dtype:
        torch.mm(*factors, out=dweight_VD) if first else torch.addmm(dweight_VD, *factors, out=dweight_VD)
    elif dweight_VD.device.type == "cuda" and first:
        torch.mm(*factors, torch.float32, out=dweight_VD)
    elif dweight_VD.device.type == "cuda":
        torch.addmm(dweight_VD, *factors, torch.float32, out=dweight_VD)
    else:
        torch.addmm(
            dweight_VD, *(factor.float() for factor in factors), beta=0 if first else 1, out=dweight_VD
        )


@cache
def _max_programs(device: torch.device) -> int:
    """Programs of `_rescale_kernel` at most: those that are resident together, so that returning at once costs nothing."""
    return (
        8 * torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else _INTERPRETER_PROGRAMS
    )


def rescale(gradient: Tensor, dloss: Tensor, expected_dloss: float) -> None:
    """gradient *= dloss / expected_dloss, in place; contiguous, any float dtype. Moves no data if they are equal."""
    num_elements, config = gradient.numel(), rescale_config()
    num_programs = min(triton.cdiv(num_elements, config["BLOCK"]), _max_programs(gradient.device))
    if num_programs:
        with torch.cuda.device_of(gradient):
            _rescale_kernel[(num_programs,)](gradient, dloss, expected_dloss, num_elements, **config)


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@torch.library.custom_op("lumi::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy_op(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    softcap: float | None,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return linear_cross_entropy_fwd(
        hidden_ND,
        weight_VD,
        targets_N.contiguous(),
        z_loss,
        softcap,
        expected_dloss,
        needs_dhidden,
        needs_dweight,
    )


@torch.library.custom_op("lumi::linear_cross_entropy_rescale", mutates_args=("gradient",))
def _rescale_op(gradient: Tensor, dloss: Tensor, expected_dloss: float) -> None:
    rescale(gradient, dloss, expected_dloss)


@_linear_cross_entropy_op.register_fake
def _(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    softcap: float | None,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dhidden = hidden_ND.new_empty(hidden_ND.shape if needs_dhidden else 0)
    sum_dtype = dweight_dtype(len(hidden_ND), len(weight_VD), hidden_ND.dtype, weight_VD.dtype)
    dweight = weight_VD.new_empty(weight_VD.shape if needs_dweight else 0, dtype=sum_dtype)
    return hidden_ND.new_empty((), dtype=torch.float32), dhidden, dweight


@_rescale_op.register_fake
def _(gradient: Tensor, dloss: Tensor, expected_dloss: float) -> None:
    return None


def _save(ctx, inputs, output) -> None:
    _, weight_VD, _, _, _, ctx.expected_dloss, ctx.needs_dhidden, ctx.needs_dweight = inputs
    _, dhidden, dweight = output
    ctx.weight_dtype = weight_VD.dtype
    ctx.mark_non_differentiable(dhidden, dweight)
    ctx.set_materialize_grads(False)  # or autograd would fill a (V, D) with zeros, as the gradient of dweight
    ctx.save_for_backward(dhidden, dweight)


def _backward(ctx, dloss: Tensor | None, *_) -> tuple[Tensor | None, ...]:
    dhidden, dweight = ctx.saved_tensors
    if dloss is None:
        return (None,) * 8
    if ctx.needs_dhidden:
        _rescale_op(dhidden, dloss, ctx.expected_dloss)
    if ctx.needs_dweight:
        _rescale_op(dweight, dloss, ctx.expected_dloss)
    return (
        dhidden if ctx.needs_dhidden else None,
        dweight.to(ctx.weight_dtype) if ctx.needs_dweight else None,
        *(None,) * 6,
    )


_linear_cross_entropy_op.register_autograd(_backward, setup_context=_save)


# --- public function: the only name other packages import ---


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float = 0.0,
    softcap: float | None = None,
    expected_dloss: float = 1.0,
) -> Tensor:
    """Sum of the cross-entropy losses of all rows with a target, without the logits of more than one chunk of rows at a time.

    Args:
        hidden_ND: final hidden states (N, D), float32 / bfloat16 / float16.
        weight_VD: output projection (V, D), one of the same dtypes, 1 <= V; cast to the dtype of hidden, once. Its gradient is summed in
            float32 and has its own dtype.
        targets_N: (N,) int64 in [0, V), or -100 for a row that does not count.
        z_loss: weight of lse^2, at least 0; 0 leaves it out.
        softcap: bound of the logits, above 0; None leaves them as they are.
        expected_dloss: the gradient that the loss will get in backward: f, if the caller runs `(loss * f).backward()`. Backward then moves
            no data (unless the loss itself is inside `torch.compile`, which copies what backward changes). Any other gradient is right as
            well and costs a read and a write of both gradients: 8 * V * D bytes and 2 * N * D elements. It is multiplied in before the
            gradient of the logits is rounded to the dtype of hidden: with float16, the place for loss scaling. 2^-100 to 2^100 in size.

    Returns:
        scalar, float32, in nats, not multiplied by `expected_dloss`. NaN if a target is out of range. Divide by the number of counted
        targets of the whole step. Differentiable once, in `hidden_ND` and `weight_VD`, and backward runs once: it scales what the forward
        left in place. Extra memory: `workspace_bytes`.

    Raises:
        ValueError: if shapes do not fit, devices differ, a dtype is none of the three, targets are not int64, or a number is out of range.

    Source: Hsu et al. 2024, https://arxiv.org/abs/2410.10989.
    """
    _check(hidden_ND, weight_VD, targets_N)
    _check_numbers(z_loss, softcap, expected_dloss)
    if len(weight_VD) == 0:
        raise ValueError(f"weight must have at least one row, got shape {tuple(weight_VD.shape)}")
    for name, tensor in (("hidden", hidden_ND), ("weight", weight_VD)):
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
    for name, tensor in (("weight", weight_VD), ("targets", targets_N)):
        if tensor.device != hidden_ND.device:
            raise ValueError(
                f"{name} must be on the device of hidden, {hidden_ND.device}, got {tensor.device}"
            )
    needs_dhidden, needs_dweight = (
        torch.is_grad_enabled() and t.requires_grad for t in (hidden_ND, weight_VD)
    )
    loss, _, _ = _linear_cross_entropy_op(
        hidden_ND,
        weight_VD,
        targets_N,
        float(z_loss),
        softcap,
        float(expected_dloss),
        needs_dhidden,
        needs_dweight,
    )
    return loss
