"""The loss of `linear_cross_entropy` in plain torch, chunk by chunk: the implementation for CPUs.

`linear_cross_entropy_reference` is the definition. It holds the logits of all rows, and so do their
gradients; this computes the same with the logits of one chunk of rows at a time.

The gradient of the sum needs one factor from upstream and nothing else. So the forward computes the gradients
of both operands while a chunk's logits are at hand, and the backward only multiplies (Hsu et al. 2024, Liger
Kernel, https://arxiv.org/abs/2410.10989).

Shape letters: N rows (B * T tokens), D model dim, V vocabulary, C rows of one chunk.
Precision: products in the dtype of `hidden`; softmax, loss and the sum of dweight over chunks in float32
(float64 stays float64).
Logits are rounded to the dtype of `hidden` twice: once as logits, once as their gradient.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.linear_cross_entropy import IGNORE_INDEX, check_numbers, check_operands


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows of one chunk.

    The chunk's float32 logits fit a CPU's cache (8 MB was measured fastest) or a modest share of a GPU (512
    MB). A chunk has at least 256 rows, because every chunk adds a whole (V, D) to dweight."""
    elements = 2**21 if device_type == "cpu" else 2**27
    return max(elements // vocab_size, 256)


def _chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    rows = chunk_rows(vocab_size, device.type)
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def _losses_and_dlogits(
    logits_CV: Tensor, targets_C: Tensor, wide: torch.dtype, z_loss: float
) -> tuple[Tensor, Tensor]:
    """losses_C1 and dlogits_CV of one chunk, both in `wide`. They are zero where the target is -100."""
    counted_C1 = (targets_C != IGNORE_INDEX)[:, None]
    index_C1 = torch.where(counted_C1, targets_C[:, None], 0)
    log_probs_CV = F.log_softmax(logits_CV, dim=-1, dtype=wide)
    losses_C1 = -log_probs_CV.gather(1, index_C1)
    lse_C1 = logits_CV.gather(1, index_C1).to(wide) + losses_C1
    dlogits_CV = log_probs_CV.exp_()
    if z_loss:
        losses_C1 += z_loss * lse_C1.square()
        dlogits_CV *= 1 + 2 * z_loss * lse_C1
    dlogits_CV.scatter_add_(1, index_C1, -torch.ones_like(lse_C1))
    return losses_C1.where(counted_C1, 0), dlogits_CV.masked_fill_(~counted_C1, 0)


def chunked_cross_entropy_fwd(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float,
    expected_dloss: float,
    needs_dhidden: bool,
    needs_dweight: bool,
    weights_N: Tensor | None = None,
    copy_VD: Tensor | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns losses_N and dweight_VD, both float32 or wider, and dhidden_ND between them.

    Both gradients are multiplied by `expected_dloss`, and each row's part by its weight. One that is not
    needed is None.
    """
    wide = torch.promote_types(hidden_ND.dtype, torch.float32)
    weight = weight_VD.to(hidden_ND.dtype) if copy_VD is None else copy_VD
    losses_N = torch.empty(len(hidden_ND), dtype=wide, device=hidden_ND.device)
    dhidden_ND = torch.empty_like(hidden_ND) if needs_dhidden else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if needs_dweight else None
    for rows in _chunks(len(hidden_ND), len(weight_VD), hidden_ND.device):
        hidden_CD = hidden_ND[rows]
        losses_C1, dlogits_CV = _losses_and_dlogits(hidden_CD @ weight.T, targets_N[rows], wide, z_loss)
        losses_N[rows] = losses_C1[:, 0]
        if expected_dloss != 1:
            dlogits_CV *= expected_dloss
        if weights_N is not None:
            dlogits_CV *= weights_N[rows, None]
        dlogits_CV = dlogits_CV.to(weight.dtype)
        if dhidden_ND is not None:
            dhidden_ND[rows] = dlogits_CV @ weight
        if dweight_VD is not None:
            dweight_VD += dlogits_CV.T @ hidden_CD
    return losses_N, dhidden_ND, dweight_VD


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        z_loss: float,
        expected_dloss: float,
        copy_VD: Tensor | None,
    ) -> Tensor:
        needs_dhidden, needs_dweight = ctx.needs_input_grad[:2]
        losses_N, dhidden_ND, dweight_VD = chunked_cross_entropy_fwd(
            hidden_ND,
            weight_VD,
            targets_N,
            z_loss,
            expected_dloss,
            needs_dhidden,
            needs_dweight,
            None,
            copy_VD,
        )
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype, ctx.expected_dloss = weight_VD.dtype, expected_dloss
        return losses_N.sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dloss: Tensor) -> tuple[Tensor | None, ...]:
        dhidden_ND, dweight_VD = ctx.saved_tensors
        factor = dloss / ctx.expected_dloss
        return (
            None if dhidden_ND is None else (dhidden_ND * factor).to(dhidden_ND.dtype),
            None if dweight_VD is None else (dweight_VD * factor).to(ctx.weight_dtype),
            *(None,) * 4,
        )


def chunked_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    z_loss: float = 0.0,
    expected_dloss: float = 1.0,
    copy_VD: Tensor | None = None,
) -> Tensor:
    """Sum of the cross-entropy losses of all rows with a target.

    Args:
        hidden_ND: final hidden states (N, D), any floating dtype.
        weight_VD: output projection (V, D), any floating dtype. It is cast to the dtype of `hidden_ND` for
            the products; its gradient has its own dtype.
        targets_N, z_loss, expected_dloss, copy_VD: as in `linear_cross_entropy`.

    Returns:
        scalar, float32 (float64 for float64 hidden), in nats. Divide by the number of counted targets of the
        whole step.

    Raises:
        ValueError: if the shapes do not fit, targets are not int64, or a number is out of range.
        IndexError: on CPU, if a target is out of range; on CUDA, a device-side assertion fails.

    Source: Hsu et al. 2024, https://arxiv.org/abs/2410.10989.
    """
    check_operands(hidden_ND, weight_VD, targets_N, copy_VD)
    check_numbers(z_loss, expected_dloss)
    return _ChunkedCrossEntropy.apply(hidden_ND, weight_VD, targets_N, z_loss, expected_dloss, copy_VD)
