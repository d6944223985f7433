"""Several linears of one input, each with a low-rank adapter.

They are q, k and v of attention, gate and up of the MLP, or a single linear.

    y_i = x W_i^T + s_i (x A_i^T) B_i^T

    z_i = s_i dy_i B_i   (the gradient of x A_i^T)
    dB_i = s_i dy_i^T (x A_i^T),   dA_i = z_i^T x,   dx = sum over i of dy_i W_i + z_i A_i

The W's are frozen and have no gradient. Hu et al. 2021, https://arxiv.org/abs/2106.09685.

Shape letters: N rows (all leading dims flattened), I input features, O output features of one linear, R the
ranks of all adapters together.
Precision: products accumulate in float32 (float64 for the reference's float64) and are rounded to the dtype
of `x`. The matrix product that computes the low-rank part also adds it to the frozen part. Gradients of
adapters are in the dtype of `x` until autograd casts them to theirs.
Cost: no kernel here is our own; all of it is matrix products of the vendor's library. The formula as written
reads x twice per linear and makes three tensors of y's size besides y; its backward makes one tensor of dy's
size and two of dx's size per linear, and adds the latter up. Here the A's are one product, forward and
backward, and every sum is accumulated in place by a product. Besides the matrices, only x and x A^T (N, R)
are kept for backward.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.custom_operator import custom_operator

# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def lora_linear_reference(
    x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """y_i (..., O_i) from x (..., I), weights (O_i, I), As (R_i, I) and Bs (O_i, R_i); all are cast to x's
    dtype."""
    ys = []
    for weight, A, B, scale in zip(weights, As, Bs, scales, strict=True):
        narrow = F.linear(x, A.to(x.dtype))
        ys.append(F.linear(x, weight.to(x.dtype)) + scale * F.linear(narrow, B.to(x.dtype)))
    return ys


# --- the products: allocate and multiply. Never autograd. ---


def lora_linear_fwd(
    x_NI: Tensor, weights_OI: Sequence[Tensor], A_RI: Tensor, Bs_OR: Sequence[Tensor], scales: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    """Returns every y_NO, and xa_NR = x A^T of all adapters side by side, in x's dtype."""
    xa_NR = x_NI @ A_RI.T
    ys_NO = []
    for weight_OI, B_OR, scale, own_NR in zip(weights_OI, Bs_OR, scales, _split(xa_NR, Bs_OR), strict=True):
        ys_NO.append((x_NI @ weight_OI.T).addmm_(own_NR, B_OR.T, alpha=scale))
    return ys_NO, xa_NR


def lora_linear_bwd(
    dys_NO: Sequence[Tensor],
    x_NI: Tensor,
    xa_NR: Tensor,
    weights_OI: Sequence[Tensor],
    A_RI: Tensor,
    Bs_OR: Sequence[Tensor],
    scales: Sequence[float],
    needs_dx: bool,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Returns [dx_NI] or, if it is not needed, []; dA_RI of all adapters; and every dB_OR. Writes to no
    input."""
    dxa_NR = torch.empty_like(xa_NR)
    dBs_OR = []
    for dy_NO, B_OR, scale, xa, dxa in zip(
        dys_NO, Bs_OR, scales, _split(xa_NR, Bs_OR), _split(dxa_NR, Bs_OR), strict=True
    ):
        dxa.addmm_(dy_NO, B_OR, beta=0, alpha=scale)
        dB_OR = torch.empty(B_OR.shape, dtype=B_OR.dtype, device=B_OR.device)
        dBs_OR.append(dB_OR.addmm_(dy_NO.T, xa, beta=0, alpha=scale))
    dx = []
    if needs_dx:
        dx_NI = dxa_NR @ A_RI
        for dy_NO, weight_OI in zip(dys_NO, weights_OI, strict=True):
            dx_NI.addmm_(dy_NO, weight_OI)
        dx.append(dx_NI)
    return dx, dxa_NR.T @ x_NI, dBs_OR


def _split(all_NR: Tensor, Bs_OR: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Each adapter's own columns, as views."""
    return all_NR.split([B_OR.shape[1] for B_OR in Bs_OR], dim=1)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@custom_operator("lumi::lora_linear")
def _lora_linear_op(
    x: Tensor, weights: Sequence[Tensor], A: Tensor, Bs: Sequence[Tensor], scales: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    ys_NO, xa_NR = lora_linear_fwd(_rows(x), weights, A, Bs, scales)
    return [y_NO.view(*x.shape[:-1], y_NO.shape[1]) for y_NO in ys_NO], xa_NR


@custom_operator("lumi::lora_linear_backward")
def _lora_linear_backward_op(
    x: Tensor,
    dys: Sequence[Tensor],
    xa: Tensor,
    weights: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    needs_dx: bool,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    dx, dA, dBs = lora_linear_bwd([_rows(dy) for dy in dys], _rows(x), xa, weights, A, Bs, scales, needs_dx)
    return [dx_NI.view(x.shape) for dx_NI in dx], dA, dBs


@_lora_linear_op.register_fake
def _(
    x: Tensor, weights: Sequence[Tensor], A: Tensor, Bs: Sequence[Tensor], scales: Sequence[float]
) -> tuple[list[Tensor], Tensor]:
    rows = math.prod(x.shape[:-1])  # not numel(), which would tie a graph to one length
    return [x.new_empty(*x.shape[:-1], weight.shape[0]) for weight in weights], x.new_empty(rows, A.shape[0])


@_lora_linear_backward_op.register_fake
def _(
    x: Tensor,
    dys: Sequence[Tensor],
    xa: Tensor,
    weights: Sequence[Tensor],
    A: Tensor,
    Bs: Sequence[Tensor],
    scales: Sequence[float],
    needs_dx: bool,
) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    return (
        [x.new_empty(x.shape)] if needs_dx else [],
        A.new_empty(A.shape),
        [B.new_empty(B.shape) for B in Bs],
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, weights, A, Bs, scales = inputs
    _, xa = output
    ctx.mark_non_differentiable(xa)
    ctx.set_materialize_grads(False)  # else autograd fills zeros for xa's gradient
    ctx.save_for_backward(x, xa, A, *weights, *Bs)
    ctx.scales = scales


def _backward(
    ctx: Any, dys: list[Tensor | None], _: None
) -> tuple[Tensor | None, list[None], Tensor, list[Tensor], None]:
    x, xa, A, *rest = ctx.saved_tensors
    weights, Bs = rest[: len(rest) // 2], rest[len(rest) // 2 :]
    present = [
        x.new_zeros(*x.shape[:-1], B.shape[0]) if dy is None else dy for dy, B in zip(dys, Bs, strict=True)
    ]
    dx, dA, dBs = _lora_linear_backward_op(
        x, present, xa, weights, A, Bs, ctx.scales, ctx.needs_input_grad[0]
    )
    return dx[0] if dx else None, [None] * len(weights), dA, dBs, None


_lora_linear_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def lora_linear(
    x: Tensor, weights: Sequence[Tensor], As: Sequence[Tensor], Bs: Sequence[Tensor], scales: Sequence[float]
) -> list[Tensor]:
    """The adapted linears of one input, with gradients of `x` and the adapters.

    Args:
        x: activations (..., I), float32 / bfloat16 / float16, any strides. 1 <= I.
        weights: frozen matrices (O_i, I), at least one; device of `x`. 1 <= O_i. A matrix of another dtype
            than `x` is cast in every call, and the cast copy is kept for backward.
        As: (R_i, I), one for each weight; device of `x`, any floating dtype, the same for all. 1 <= R_i.
        Bs: (O_i, R_i), one for each weight; as `As`.
        scales: s_i, one for each weight.

    Returns:
        One y_i (..., O_i) for each weight, dtype of `x`, contiguous. Differentiable once, in `x`, `As` and
        `Bs`; each gradient has its tensor's dtype.

    Raises:
        ValueError: if there are no weights, the lists differ in length, shapes or devices do not fit, x's
            dtype is none of the three, or a weight requires a gradient: it would get none.

    Source: Hu et al. 2021, https://arxiv.org/abs/2106.09685.
    """
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"x must be float32, bfloat16 or float16, got {x.dtype}")
    in_features = x.shape[-1] if x.ndim > 0 else 0
    if in_features == 0:
        raise ValueError(f"x must have a last dimension of at least 1, got shape {tuple(x.shape)}")
    if not len(weights) == len(As) == len(Bs) == len(scales) > 0:
        raise ValueError(
            "weights, As, Bs and scales must be equally many, and at least one, "
            f"got {len(weights)}, {len(As)}, {len(Bs)} and {len(scales)}"
        )
    for index, (weight, A, B) in enumerate(zip(weights, As, Bs, strict=True)):
        for name, letter, matrix in (("weights", "O", weight), ("As", "R", A)):
            if matrix.ndim != 2 or matrix.shape[0] == 0 or matrix.shape[1] != in_features:
                raise ValueError(
                    f"{name}[{index}] must have shape ({letter}, {in_features}), {letter} at least 1, "
                    f"to match x {tuple(x.shape)}, got {tuple(matrix.shape)}"
                )
        if B.shape != (weight.shape[0], A.shape[0]):
            raise ValueError(
                f"Bs[{index}] must have shape {(weight.shape[0], A.shape[0])} to match its weight and A, "
                f"got {tuple(B.shape)}"
            )
        for name, tensor in (("weights", weight), ("As", A), ("Bs", B)):
            if tensor.device != x.device:
                raise ValueError(
                    f"{name}[{index}] must be on the device of x, {x.device}, got {tensor.device}"
                )
        if A.dtype != As[0].dtype or B.dtype != As[0].dtype:
            raise ValueError(
                f"As[{index}] and Bs[{index}] must have the dtype of As[0], {As[0].dtype}, "
                f"got {A.dtype} and {B.dtype}"
            )
        if weight.requires_grad:
            raise ValueError(
                f"weights[{index}] must be frozen (requires_grad=False), got one that requires a gradient"
            )
    # The A's are joined and everything is cast here: autograd then splits the gradients and casts them back.
    ys, _ = _lora_linear_op(
        x,
        [weight.to(x.dtype) for weight in weights],
        torch.cat(list(As)).to(x.dtype),
        [B.to(x.dtype) for B in Bs],
        list(scales),
    )
    return ys
