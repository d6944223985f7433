"""RMSNorm, fused over the last dimension.

    y = x * rstd * weight,   rstd = 1 / sqrt(mean(x^2) + eps)

    dx      = rstd * (dy * weight - x_hat * mean(dy * weight * x_hat)),   x_hat = x * rstd
    dweight = sum over rows of dy * x_hat

Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.

Shape letters: N rows (all leading dims flattened), D model dim, P programs of the backward.
Precision: statistics and all arithmetic are float32 (the reference keeps float64 as float64). Every output is
cast once: to the dtype of `x`, or, for the weight's gradient, to the dtype of `weight`.
Cost: forward reads x once and writes y once; backward reads x and dy once and writes dx once.
"""

import math
from functools import cache
from typing import Any, no_type_check

import torch
from torch import Tensor

from lumi.kernels.custom_operator import custom_operator
from lumi.kernels.native import address, check_taken, cpu_operators
from lumi.kernels.optional_triton import tl, triton
from lumi.kernels.strided_rows import strided_rows

MAX_D = 16_384  # the forward holds a row in registers
_WIDE_D = 8192  # above this the backward's row does not fit in registers, and it walks the row in pieces
_WIDE_BLOCK_D = 4096
_PREFETCHED_D = 4096
_TILE = 2048  # elements that a program should at least have to do: narrow rows share a program
_INTERPRETER_PROGRAMS = 3  # few: in the interpreter's tests a program of the backward takes several tiles


# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """y (..., D) from x (..., D) and weight (D,). Computed in float32 (float64 stays float64), cast once."""
    wide = torch.promote_types(x.dtype, torch.float32)
    x_wide = x.to(wide)
    rstd = torch.rsqrt(x_wide.square().mean(dim=-1, keepdim=True) + eps)
    return (x_wide * rstd * weight.to(wide)).to(x.dtype)


# --- Triton kernels: a tile of BLOCK_N whole rows at a time ---
# For `add_rms_norm` they also read residual_ptr and write total_ptr, or read dtotal_ptr. `rms_norm` passes
# None for these, which the compiler takes as a constant.


@triton.jit(do_not_specialize=["N"])  # one compilation for every number of rows
@no_type_check
def _rms_norm_fwd_kernel(
    x_ptr, residual_ptr, weight_ptr, total_ptr, y_ptr, rstd_ptr,
    stride_xn, stride_residualn, stride_yn,
    N, D, eps,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: N * D can exceed 2**31
    cols = tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (cols < D)[None, :]

    x = tl.load(x_ptr + rows[:, None] * stride_xn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    if residual_ptr is not None:
        residual_ptrs = residual_ptr + rows[:, None] * stride_residualn + cols[None, :]
        residual = tl.load(residual_ptrs, mask=mask, other=0.0).to(tl.float32)
        total = (x + residual).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + rows[:, None] * stride_yn + cols[None, :], total, mask=mask)
        x = total.to(tl.float32)  # the norm is of the sum as it was stored, so that backward has it exactly

    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / D + eps)
    y = x * rstd[:, None] * weight[None, :]

    tl.store(y_ptr + rows[:, None] * stride_yn + cols[None, :], y, mask=mask)
    tl.store(rstd_ptr + rows, rstd, mask=rows < N)


@triton.jit(do_not_specialize=["N", "num_tiles"])
@no_type_check
def _rms_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_partial_ptr,
    stride_dyn, stride_dtotaln, stride_xn, stride_dxn,
    N, D, num_tiles,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK_D)
    weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)  # summed over BLOCK_N once, after the loop

    # With STAGES > 1 the next tile is copied to shared memory while this one is worked on.
    for tile in tl.range(program, num_tiles, tl.num_programs(0), num_stages=STAGES):
        rows = tile * BLOCK_N + tl.arange(0, BLOCK_N)
        mask = (rows < N)[:, None] & (cols < D)[None, :]
        wide = rows.to(tl.int64)[:, None]  # N * D can exceed 2**31
        x = tl.load(x_ptr + wide * stride_xn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide * stride_dyn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + rows, mask=rows < N, other=0.0)[:, None]

        x_hat = x * rstd
        dx_hat = dy * weight[None, :]
        dx = rstd * (dx_hat - x_hat * (tl.sum(dx_hat * x_hat, axis=1) / D)[:, None])
        dweight += dy * x_hat
        if dtotal_ptr is not None:
            dtotal_ptrs = dtotal_ptr + wide * stride_dtotaln + cols[None, :]
            dx += tl.load(dtotal_ptrs, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx_ptr + wide * stride_dxn + cols[None, :], dx, mask=mask)

    tl.store(dweight_partial_ptr + program.to(tl.int64) * D + cols, tl.sum(dweight, axis=0), mask=cols < D)


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _rms_norm_bwd_wide_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, rstd_ptr, dx_ptr, dweight_partial_ptr,
    stride_dyn, stride_dtotaln, stride_xn, stride_dxn,
    N, D,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    # Two walks over each row; the second finds x and dy in the L1 cache. dweight_partial starts as zeros and
    # stays in the L2 cache.
    program = tl.program_id(0).to(tl.int64)  # and with it `row`
    partial_ptr = dweight_partial_ptr + program * D

    for row in range(program, N, tl.num_programs(0)):
        rstd = tl.load(rstd_ptr + row)
        products = tl.zeros((BLOCK_D,), dtype=tl.float32)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            x = tl.load(x_ptr + row * stride_xn + cols, mask=cols < D, other=0.0).to(tl.float32)
            dy = tl.load(dy_ptr + row * stride_dyn + cols, mask=cols < D, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            products += dy * weight * (x * rstd)
        mean = tl.sum(products, axis=0) / D

        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            x_hat = tl.load(x_ptr + row * stride_xn + cols, mask=cols < D, other=0.0).to(tl.float32) * rstd
            dy = tl.load(dy_ptr + row * stride_dyn + cols, mask=cols < D, other=0.0).to(tl.float32)
            weight = tl.load(weight_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
            dweight = tl.load(partial_ptr + cols, mask=cols < D, other=0.0)
            tl.store(partial_ptr + cols, dweight + dy * x_hat, mask=cols < D)
            dx = rstd * (dy * weight - x_hat * mean)
            if dtotal_ptr is not None:
                dtotal_ptrs = dtotal_ptr + row * stride_dtotaln + cols
                dx += tl.load(dtotal_ptrs, mask=cols < D, other=0.0).to(tl.float32)
            tl.store(dx_ptr + row * stride_dxn + cols, dx, mask=cols < D)


# --- launchers: allocate, pick block sizes, launch. Never autograd. ---


def forward_config(D: int) -> dict[str, int]:
    """BLOCK_N, BLOCK_D and num_warps for rows of D elements: 16 per thread, at least _TILE per program."""
    block_d = triton.next_power_of_2(D)
    block_n = max(_TILE // block_d, 1)
    return {"BLOCK_N": block_n, "BLOCK_D": block_d, "num_warps": block_n * block_d // 512}


def backward_config(D: int) -> dict[str, int]:
    """As `forward_config`, with 8 elements per thread, so that it needs 64 to 80 registers, and STAGES: two
    tiles of three tensors stand in shared memory where they fit on every GPU, in float32 too. Rows wider than
    _WIDE_D have no BLOCK_N: `_rms_norm_bwd_wide_kernel` takes them."""
    if D > _WIDE_D:
        return {"BLOCK_D": _WIDE_BLOCK_D, "num_warps": _WIDE_BLOCK_D // 256}
    config = forward_config(D)
    return {**config, "num_warps": 2 * config["num_warps"], "STAGES": 3 if D <= _PREFETCHED_D else 1}


@cache
def _max_programs(device: torch.device, num_warps: int) -> int:
    """The most programs of the backward: about 24 warps on every SM. They are resident together: a thread has
    at most 80 registers in programs of 8 warps, and 64 in larger ones.

    Each program writes one row of dweight. More programs would lengthen the second stage's sum and gain
    nothing.
    """
    if device.type != "cuda":
        return _INTERPRETER_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * triton.cdiv(24, num_warps)


def rms_norm_fwd(x_ND: Tensor, weight_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Returns y_ND in x's dtype and rstd_N in float32.

    `x_ND` may have any row stride; within a row the stride is 1.
    """
    N, D = x_ND.shape
    y_ND = torch.empty(N, D, dtype=x_ND.dtype, device=x_ND.device)
    rstd_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    config = forward_config(D)
    with torch.cuda.device_of(x_ND):  # Triton launches on the current device, which need not be x's
        _rms_norm_fwd_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            x_ND, None, weight_D, None, y_ND, rstd_N, x_ND.stride(0), 0, y_ND.stride(0), N, D, eps, **config
        )
    return y_ND, rstd_N


def rms_norm_bwd(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, dtotal_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Returns dx_ND in x's dtype and dweight_D in weight's dtype. Adds `dtotal_ND` to dx_ND. Writes to no
    input."""
    N, D = x_ND.shape
    dx_ND = torch.empty(N, D, dtype=x_ND.dtype, device=x_ND.device)
    config = backward_config(D)
    num_tiles = triton.cdiv(N, config.get("BLOCK_N", 1))
    num_programs = min(num_tiles, _max_programs(x_ND.device, config["num_warps"]))
    dweight_PD = torch.empty(num_programs, D, dtype=torch.float32, device=x_ND.device)
    tensors = (dy_ND, dtotal_ND, x_ND, weight_D, rstd_N, dx_ND, dweight_PD)
    strides = (
        dy_ND.stride(0),
        0 if dtotal_ND is None else dtotal_ND.stride(0),
        x_ND.stride(0),
        dx_ND.stride(0),
    )
    with torch.cuda.device_of(x_ND):
        if D <= _WIDE_D:
            _rms_norm_bwd_kernel[(num_programs,)](*tensors, *strides, N, D, num_tiles, **config)
        else:
            dweight_PD.zero_()
            _rms_norm_bwd_wide_kernel[(num_programs,)](*tensors, *strides, N, D, **config)
    return dx_ND, dweight_PD.sum(dim=0).to(weight_D.dtype)  # two-stage sum: deterministic, no atomics


# --- C++ for CPUs: the same, by csrc/cpu/rms_norm.h ---


def native_rms_norm_fwd(
    x_ND: Tensor, weight_D: Tensor, eps: float, residual_ND: Tensor | None = None
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns y_ND, x_ND + residual_ND (None without a residual) and rstd_N in float32."""
    (N, D), weight_D = x_ND.shape, weight_D.float()
    y_ND, rstd_N = torch.empty(N, D, dtype=x_ND.dtype), torch.empty(N)
    total_ND = None if residual_ND is None else torch.empty_like(y_ND)
    tensors = x_ND, residual_ND, weight_D, total_ND, y_ND, rstd_N
    residual_stride = 0 if residual_ND is None else residual_ND.stride(0)
    cpu_operators(x_ND.dtype).rms_norm(
        *map(address, tensors), N, D, x_ND.stride(0), residual_stride, eps, torch.get_num_threads()
    )
    return y_ND, total_ND, rstd_N


def native_rms_norm_bwd(
    dy_ND: Tensor, x_ND: Tensor, weight_D: Tensor, rstd_N: Tensor, dtotal_ND: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `rms_norm_bwd`."""
    (N, D), operators, weight = x_ND.shape, cpu_operators(x_ND.dtype), weight_D.float()
    dx_ND, dweight_D = torch.empty(N, D, dtype=x_ND.dtype), torch.empty(D)
    partials_PD = torch.empty(operators.rms_norm_pieces(N, D), D)
    tensors = dy_ND, dtotal_ND, x_ND, weight, rstd_N, dx_ND, dweight_D, partials_PD
    dtotal_stride = 0 if dtotal_ND is None else dtotal_ND.stride(0)
    strides = dy_ND.stride(0), dtotal_stride, x_ND.stride(0)
    operators.rms_norm_backward(*map(address, tensors), N, D, *strides, torch.get_num_threads())
    return dx_ND, dweight_D.to(weight_D.dtype)


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@custom_operator("lumi::rms_norm")
def _rms_norm_op(x: Tensor, weight: Tensor, eps: float, native: bool = False) -> tuple[Tensor, Tensor]:
    if native:
        y_ND, _, rstd_N = native_rms_norm_fwd(strided_rows(x), weight.contiguous(), eps)
    else:
        y_ND, rstd_N = rms_norm_fwd(strided_rows(x), weight.contiguous(), eps)
    return y_ND.view(x.shape), rstd_N


@custom_operator("lumi::rms_norm_backward")
def _rms_norm_backward_op(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, native: bool = False
) -> tuple[Tensor, Tensor]:
    launch = native_rms_norm_bwd if native else rms_norm_bwd
    dx_ND, dweight_D = launch(strided_rows(dy), strided_rows(x), weight.contiguous(), rstd)
    return dx_ND.view(x.shape), dweight_D


@_rms_norm_op.register_fake
def _(x: Tensor, weight: Tensor, eps: float, native: bool = False) -> tuple[Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # not numel(), which would tie a graph to one length
    return x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@_rms_norm_backward_op.register_fake
def _(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, native: bool = False) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, ctx.native = inputs
    _, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # else autograd fills zeros for rstd's gradient
    ctx.save_for_backward(x, weight, rstd)


def _backward(ctx: Any, dy: Tensor, _: None) -> tuple[Tensor, Tensor, None, None]:
    dx, dweight = _rms_norm_backward_op(dy, *ctx.saved_tensors, ctx.native)
    return dx, dweight, None, None


_rms_norm_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """RMS-normalise the last dimension of `x` and scale it by `weight`.

    Args:
        x: activations (..., D), float32 / bfloat16 / float16, any strides. 1 <= D <= 16,384.
        weight: gain (D,), float32 / bfloat16 / float16 (it may differ from the dtype of `x`), device of `x`.
        eps: added to mean(x^2) before the root; dimensionless.

    Returns:
        y (..., D), dtype of `x`, contiguous. Differentiable once, in `x` and `weight`.

    Raises:
        ValueError: if `weight` is not (D,), devices differ, a dtype is none of the three, or D is out of
            range.

    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    check_operands(x, weight)
    y, _ = _rms_norm_op(x, weight, eps)
    return y


def rms_norm_native(x: Tensor, weight: Tensor, eps: float = 1e-5) -> Tensor:
    """As `rms_norm`, in C++: float32 or bfloat16 on a CPU."""
    check_taken(x)
    check_operands(x, weight)
    y, _ = _rms_norm_op(x, weight, eps, True)
    return y


def check_operands(x: Tensor, weight: Tensor) -> None:
    """Raises ValueError as `rms_norm` says."""
    D = x.shape[-1] if x.ndim > 0 else 0
    if not 1 <= D <= MAX_D:
        raise ValueError(
            f"the last dimension of x must be between 1 and {MAX_D} (a row is held in registers), got {D}"
        )
    if weight.shape != (D,):
        raise ValueError(
            f"weight must have shape ({D},) to match x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if weight.device != x.device:
        raise ValueError(f"weight must be on the device of x, {x.device}, got {weight.device}")
    for name, tensor in (("x", x), ("weight", weight)):
        if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            raise ValueError(f"{name} must be float32, bfloat16 or float16, got {tensor.dtype}")
