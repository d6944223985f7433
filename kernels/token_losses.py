"""The cross-entropy loss of each row, for losses that are no sum over the rows.

    logits = hidden . weight^T
    loss_n = log sum_v exp(logits_n[v]) - logits_n[target_n]   (0 where target_n = -100)

    dlogits_n = dloss_n * (softmax(logits_n) - onehot(target_n))
    dhidden = dlogits . weight,   dweight = dlogits^T . hidden

`linear_cross_entropy` computes its gradients in the forward, because one factor from upstream is all that it
lacks. Here each row has a factor of its own, which is not known before the last loss is. So the forward keeps
nothing but its inputs, and the backward computes the logits of one chunk of rows after another again, as
Wijmans et al. do (2024, https://arxiv.org/abs/2411.09009). That is a fourth product, 2 * N * D * V FLOPs, and
no more memory.

Shape letters: N rows (B * T tokens), D model dim, V vocabulary.
Precision: that of `linear_cross_entropy` in the same bundle; a row's factor is multiplied in before the
gradient of its logits is rounded.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.chunked_cross_entropy import chunked_cross_entropy_fwd
from lumi.kernels.linear_cross_entropy import (
    IGNORE_INDEX,
    check,
    check_operands,
    linear_cross_entropy_fwd,
    native_linear_cross_entropy_fwd,
)
from lumi.kernels.native import check_taken


def token_losses_reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """The definition: as `token_losses`, in any floating dtype. Holds the logits of all rows."""
    check_operands(hidden_ND, weight_VD, targets_N)
    logits_NV = hidden_ND @ weight_VD.to(hidden_ND.dtype).T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, targets_N, ignore_index=IGNORE_INDEX, reduction="none")


class _TokenLosses(torch.autograd.Function):
    """`launch` is what computes the losses and gradients of `linear_cross_entropy` in a bundle."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        copy_VD: Tensor | None,
        launch: Callable[..., Any],
    ) -> Tensor:
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N, copy_VD)
        ctx.launch = launch
        return launch(hidden_ND, weight_VD, targets_N, 0.0, 1.0, False, False, None, copy_VD)[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dlosses_N: Tensor) -> tuple[Tensor | None, ...]:
        needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
        *operands, copy_VD = ctx.saved_tensors
        _, dhidden_ND, dweight_VD = ctx.launch(
            *operands, 0.0, 1.0, needs_dhidden, needs_dweight, dlosses_N.contiguous(), copy_VD
        )
        return (
            dhidden_ND if needs_dhidden else None,
            dweight_VD.to(operands[1].dtype) if needs_dweight else None,
            *(None,) * 3,
        )


def token_losses(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor | None = None
) -> Tensor:
    """The cross-entropy loss of each row. Only one chunk of rows has its logits in memory at a time.

    Args:
        hidden_ND, weight_VD, targets_N, copy_VD: as in
            `lumi.kernels.linear_cross_entropy.linear_cross_entropy`.

    Returns:
        (N,) float32, in nats; 0 where the target is -100, NaN where it is out of range. Differentiable once,
        in `hidden_ND` and `weight_VD`, for any incoming gradient.

    Raises:
        ValueError: as `linear_cross_entropy`.
    """
    check(hidden_ND, weight_VD, targets_N, copy_VD)
    return _TokenLosses.apply(hidden_ND, weight_VD, targets_N, copy_VD, linear_cross_entropy_fwd)


def token_losses_native(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor | None = None
) -> Tensor:
    """As `token_losses`, on a CPU: hidden is float32 or bfloat16.

    Raises:
        ValueError: as `token_losses`.
        IndexError: if a target is out of range.
    """
    check_taken(hidden_ND)
    check(hidden_ND, weight_VD, targets_N, copy_VD)
    return _TokenLosses.apply(hidden_ND, weight_VD, targets_N, copy_VD, native_linear_cross_entropy_fwd)


def token_losses_chunked(
    hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor | None = None
) -> Tensor:
    """As `token_losses`, in plain torch and any floating dtype; float64 losses for float64 hidden.

    Raises:
        ValueError: if the shapes do not fit, or targets are not int64.
        IndexError: on CPU, if a target is out of range; on CUDA, a device-side assertion fails.
    """
    check_operands(hidden_ND, weight_VD, targets_N, copy_VD)
    return _TokenLosses.apply(hidden_ND, weight_VD, targets_N, copy_VD, chunked_cross_entropy_fwd)
