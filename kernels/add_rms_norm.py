"""The sum of a residual stream and a branch, and its RMSNorm, in one pass over memory.

    total = x + residual,   y = rms_norm(total, weight)

    dx = dresidual = dtotal + d rms_norm(total),   dweight as in `rms_norm`

RMSNorm: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467. Pre-norm residual layers: Xiong et al. 2020,
https://arxiv.org/abs/2002.04745.

Shape letters: N rows (all leading dims flattened), D model dim.
Precision: the sum is float32 and rounded once to the dtype of `x`. The norm is of that rounded sum, as if the
two steps were separate, and backward is the gradient of exactly that. The rest is as in `rms_norm`, whose
kernels these are.
Cost: forward reads x and residual and writes total and y. Backward reads dy, dtotal and total and writes one
gradient, which x and residual share. Separate steps would move one tensor more in forward (total is read
again) and two more in backward.
"""

import math
from typing import Any

import torch
from torch import Tensor

from lumi.kernels.custom_operator import custom_operator
from lumi.kernels.native import check_taken
from lumi.kernels.optional_triton import triton
from lumi.kernels.rms_norm import (
    _rms_norm_backward_op,
    _rms_norm_fwd_kernel,
    check_operands,
    forward_config,
    native_rms_norm_bwd,
    native_rms_norm_fwd,
    rms_norm_bwd,
    rms_norm_reference,
)
from lumi.kernels.strided_rows import strided_rows

# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def add_rms_norm_reference(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """y and total (..., D) from x and residual (..., D) and weight (D,). y is the norm of the rounded
    total."""
    total = x + residual
    return rms_norm_reference(total, weight, eps), total


# --- launchers: allocate and launch the kernels of `rms_norm`. Never autograd. ---


def add_rms_norm_fwd(
    x_ND: Tensor, residual_ND: Tensor, weight_D: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns y_ND and total_ND in x's dtype and rstd_N in float32.

    The inputs may have any row stride; within a row the stride is 1.
    """
    N, D = x_ND.shape
    y_ND, total_ND = (torch.empty(N, D, dtype=x_ND.dtype, device=x_ND.device) for _ in range(2))
    rstd_N = torch.empty(N, dtype=torch.float32, device=x_ND.device)
    config = forward_config(D)
    with torch.cuda.device_of(x_ND):  # Triton launches on the current device, which need not be x's
        _rms_norm_fwd_kernel[(triton.cdiv(N, config["BLOCK_N"]),)](
            x_ND, residual_ND, weight_D, total_ND, y_ND, rstd_N,
            x_ND.stride(0), residual_ND.stride(0), y_ND.stride(0), N, D, eps, **config,
        )  # fmt: skip
    return y_ND, total_ND, rstd_N


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@custom_operator("lumi::add_rms_norm")
def _add_rms_norm_op(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, native: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    x_ND, residual_ND, weight = strided_rows(x), strided_rows(residual), weight.contiguous()
    if native:
        y_ND, total_ND, rstd_N = native_rms_norm_fwd(x_ND, weight, eps, residual_ND)
    else:
        y_ND, total_ND, rstd_N = add_rms_norm_fwd(x_ND, residual_ND, weight, eps)
    return y_ND.view(x.shape), total_ND.view(x.shape), rstd_N


@custom_operator("lumi::add_rms_norm_backward")
def _add_rms_norm_backward_op(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, native: bool = False
) -> tuple[Tensor, Tensor]:
    dx_ND, dweight_D = (native_rms_norm_bwd if native else rms_norm_bwd)(
        strided_rows(dy), strided_rows(total), weight.contiguous(), rstd, strided_rows(dtotal)
    )
    return dx_ND.view(total.shape), dweight_D


@_add_rms_norm_op.register_fake
def _(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, native: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    rows = math.prod(x.shape[:-1])  # not numel(), which would tie a graph to one length
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(rows, dtype=torch.float32)


@_add_rms_norm_backward_op.register_fake
def _(
    dy: Tensor, dtotal: Tensor, total: Tensor, weight: Tensor, rstd: Tensor, native: bool = False
) -> tuple[Tensor, Tensor]:
    return total.new_empty(total.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, _, weight, _, ctx.native = inputs
    _, total, rstd = output
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)  # an output that nothing uses brings None, not zeros to write and read
    ctx.save_for_backward(total, weight, rstd)


def _backward(
    ctx: Any, dy: Tensor | None, dtotal: Tensor | None, _: None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None, None]:
    total, weight, rstd = ctx.saved_tensors
    if dy is None:
        return dtotal, dtotal, None, None, None
    if dtotal is None:
        dx, dweight = _rms_norm_backward_op(dy, total, weight, rstd, ctx.native)
    else:
        dx, dweight = _add_rms_norm_backward_op(dy, dtotal, total, weight, rstd, ctx.native)
    # One tensor for both, as torch does for a sum: autograd adds in place only to what it alone holds.
    return dx, dx, dweight, None, None


_add_rms_norm_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor]:
    """x + residual, and its RMSNorm over the last dimension, scaled by `weight`.

    Args:
        x: activations (..., D), float32 / bfloat16 / float16, any strides. 1 <= D <= 16,384.
        residual: what to add; shape, dtype and device of `x`, any strides.
        weight: gain (D,), float32 / bfloat16 / float16 (it may differ from the dtype of `x`), device of `x`.
        eps: added to mean(total^2) before the root; dimensionless.

    Returns:
        y and total (..., D), dtype of `x`, contiguous. Differentiable once, in `x`, `residual` and `weight`.

    Raises:
        ValueError: if `residual` or `weight` does not fit `x`, a dtype is none of the three, or D is out of
            range.



    Source: Zhang & Sennrich 2019, https://arxiv.org/abs/1910.07467.
    """
    _check(x, residual, weight)
    y, total, _ = _add_rms_norm_op(x, residual, weight, eps)
    return y, total


def add_rms_norm_native(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """As `add_rms_norm`, in C++: float32 or bfloat16 on a CPU."""
    check_taken(x, residual)
    _check(x, residual, weight)
    y, total, _ = _add_rms_norm_op(x, residual, weight, eps, True)
    return y, total


def _check(x: Tensor, residual: Tensor, weight: Tensor) -> None:
    check_operands(x, weight)
    if residual.shape != x.shape or residual.dtype != x.dtype or residual.device != x.device:
        raise ValueError(
            f"residual must have shape, dtype and device of x, {tuple(x.shape)}, {x.dtype}, {x.device}, "
            f"got {tuple(residual.shape)}, {residual.dtype}, {residual.device}"
        )
