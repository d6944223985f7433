"""A product with a weight matrix, or with several that share an input.

    y = x W^T + b,   where there is a b
    [y_1, y_2, ...] = x [W_1; W_2; ...]^T,   dx = dy W,   dW = dy^T x

Shape letters: N rows (all leading dims flattened), I and O features in and out.
Precision: products in the dtype of `x`; few rows on a CPU are summed in float32 and rounded once. On CUDA the
gradient of a float32 weight is never rounded to 16 bits.
Cost: few rows, as in generation, cost the reading of W. torch's product for a CPU reads it at a third of the
memory's rate or less. So csrc/cpu/linear.h takes these.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.custom_operator import runs_directly
from lumi.kernels.native import cpu_operators

# Rows up to which the operator for CPUs beats torch's product, by element size: torch multiplies bfloat16 by
# instructions of its own.
FEW_ROWS = {4: 32, 2: 8}


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., O) from x (..., I), weight (O, I) and bias (O,), which are cast to the dtype of `x`."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear_reference`. Without gradients, C++ multiplies few rows by a contiguous weight of their
    dtype."""
    plain = runs_directly(x, weight) and weight.dtype == x.dtype and weight.is_contiguous()
    # Asked last: a compiled graph must not depend on the number of rows.
    if plain and 0 < x.numel() <= FEW_ROWS[x.element_size()] * x.shape[-1]:
        y = native_linear(x, weight)
        return y if bias is None else y.add_(bias.to(y.dtype))
    return linear_reference(x, weight, bias)


def native_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y (..., O), contiguous."""
    outputs, inputs = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    wide = x.float().contiguous()
    cpu_operators(x.dtype).linear(
        wide.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // inputs, inputs, outputs,
        torch.get_num_threads(),
    )  # fmt: skip
    return y


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, joined: Tensor, bias: Tensor | None, *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.save_for_backward(x, joined)
        ctx.sizes, ctx.dtype = [len(weight) for weight in weights], weights[0].dtype
        return _split(F.linear(x, joined, bias), ctx.sizes, dim=-1)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        x, joined = ctx.saved_tensors
        needs_dx, _, needs_dbias, *needs_dweights = ctx.needs_input_grad
        dy_NO, x_NI = (t.reshape(-1, t.shape[-1]) for t in (_side_by_side(dys), x))
        dweights: Sequence[Tensor | None] = [None] * len(dys)
        if any(needs_dweights):
            dweights = _split(_wide_product(dy_NO.T, x_NI, ctx.dtype), ctx.sizes, dim=0)
        return (
            (dy_NO @ joined).view(x.shape) if needs_dx else None,
            None,
            dy_NO.sum(0) if needs_dbias else None,
            *dweights,
        )


def _side_by_side(parts: Sequence[Tensor]) -> Tensor:
    """(..., sum of O_i) from parts (..., O_i): the tensor that they are the columns of, or a new one."""
    if len(parts) == 1:
        return parts[0]
    whole = None if torch.compiler.is_compiling() else parts[0]._base
    sizes = [part.shape[-1] for part in parts]
    if whole is not None and whole.shape == (*parts[0].shape[:-1], sum(sizes)) and whole.is_contiguous():
        first = whole.storage_offset()
        places = [(id(whole), whole.stride(), first + start) for start in (0, *accumulate(sizes[:-1]))]
        if places == [(id(part._base), part.stride(), part.storage_offset()) for part in parts]:
            return whole
    return torch.cat(list(parts), dim=-1)


def _split(t: Tensor, sizes: Sequence[int], dim: int) -> tuple[Tensor, ...]:
    return (t,) if len(sizes) == 1 else torch.split(t, list(sizes), dim)


def _wide_product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a @ b in `dtype`. Only CUDA has a product of 16-bit factors with a float32 result; elsewhere it is
    rounded to theirs first."""
    if a.device.type == "cuda" and a.dtype != dtype == torch.float32:
        return torch.mm(a, b, out_dtype=dtype)
    return (a @ b).to(dtype)


def joined_linear(
    x: Tensor,
    joined: Tensor,
    weights: Sequence[Tensor],
    bias: Tensor | None = None,
    linear: Callable[..., Tensor] = linear_reference,
) -> list[Tensor]:
    """Several linears of one input as one product.

    Args:
        x: (..., I).
        joined: (sum of O_i, I), the values of the weights one after another, in the dtype of `x`.
        weights: (O_i, I), of one dtype. They get the gradients, in their dtype; only their sizes are read.
        bias: (sum of O_i,), in the dtype of `x`.
        linear: multiplies where no gradient is wanted.

    Returns:
        One y_i (..., O_i) for each weight: columns of one tensor. Differentiable once, in `x`, `weights` and
        `bias`.
    """
    if torch.is_grad_enabled():
        return list(_JoinedLinear.apply(x, joined, bias, *weights))
    return list(_split(linear(x, joined, bias), [len(weight) for weight in weights], dim=-1))
