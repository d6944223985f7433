"""The output projection and the cross-entropy loss in one, so that the logits of all tokens never exist at once.

    loss = - sum over n with target_n != -100 of log softmax(hidden_n . weight^T)[target_n]

    dlogits = softmax - onehot(target),   dhidden = dlogits . weight,   dweight = dlogits^T . hidden

The gradient of the sum needs nothing from upstream but one factor, so the forward computes it chunk by chunk while the logits are at
hand, and the backward only multiplies (Hsu et al. 2024, Liger Kernel, https://arxiv.org/abs/2410.10989; Wijmans et al. 2024,
https://arxiv.org/abs/2411.09009).

Shape letters: N rows (B * T tokens), D model dim, V vocabulary, C rows of one chunk.
Precision: products in the dtype of `hidden`; log-softmax, loss and the sum of dweight over chunks in float32 (float64 stays float64).
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def chunk_rows(vocab_size: int, device_type: str) -> int:
    """Rows whose logits exist at once: as many as fit a CPU's cache (8 MB; measured fastest) or a modest share of a GPU (512 MB), in
    float32; at least 256, since every chunk adds a whole (V, D) to dweight."""
    elements = 2**21 if device_type == "cpu" else 2**27
    return max(elements // vocab_size, 256)


def _chunks(num_rows: int, vocab_size: int, device: torch.device) -> Iterator[slice]:
    rows = chunk_rows(vocab_size, device.type)
    return (slice(start, start + rows) for start in range(0, num_rows, rows))


def _log_probs(hidden_CD: Tensor, weight_VD: Tensor, wide: torch.dtype) -> Tensor:
    return F.log_softmax(hidden_CD @ weight_VD.T, dim=-1, dtype=wide)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
        wide = torch.promote_types(hidden_ND.dtype, torch.float32)
        weight = weight_VD.to(hidden_ND.dtype)
        loss = torch.zeros((), dtype=wide, device=hidden_ND.device)
        dhidden_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if ctx.needs_input_grad[1] else None
        for rows in _chunks(*_sizes(hidden_ND, weight_VD)):
            hidden_CD, targets_C = hidden_ND[rows], targets_N[rows]
            counted_C1 = (targets_C != IGNORE_INDEX)[:, None]
            index_C1 = torch.where(counted_C1, targets_C[:, None], 0)
            log_probs_CV = _log_probs(hidden_CD, weight, wide)
            loss -= log_probs_CV.gather(1, index_C1).where(counted_C1, 0).sum()
            dlogits_CV = log_probs_CV.exp_().scatter_add_(1, index_C1, -torch.ones_like(index_C1, dtype=wide))
            dlogits_CV = dlogits_CV.masked_fill_(~counted_C1, 0).to(weight.dtype)
            if dhidden_ND is not None:
                dhidden_ND[rows] = dlogits_CV @ weight
            if dweight_VD is not None:
                dweight_VD += dlogits_CV.T @ hidden_CD
        ctx.save_for_backward(dhidden_ND, dweight_VD)
        ctx.weight_dtype = weight_VD.dtype
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dloss: Tensor):
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return (
            None if dhidden_ND is None else (dhidden_ND * dloss).to(dhidden_ND.dtype),
            None if dweight_VD is None else (dweight_VD * dloss).to(ctx.weight_dtype),
            None,
        )


def linear_cross_entropy_reference(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> Tensor:
    """Sum of the cross-entropy losses of all rows with a target.

    Args:
        hidden_ND: final hidden states (N, D), floating.
        weight_VD: output projection (V, D); cast to the dtype of hidden for the products, its gradient keeps its own dtype.
        targets_N: (N,) int64 in [0, V), or -100 for a row that does not count.

    Returns:
        scalar, float32 (float64 for float64 hidden), in nats. Divide by the number of counted targets of the whole step.

    Raises:
        ValueError: if the shapes do not fit or targets are not int64.
        IndexError: on CPU, if a target is out of range; on CUDA, a device-side assertion.
    """
    _check(hidden_ND, weight_VD, targets_N)
    return _LinearCrossEntropy.apply(hidden_ND, weight_VD, targets_N)


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
        losses_N[rows] = F.nll_loss(log_probs_CV, targets_N[rows], ignore_index=IGNORE_INDEX, reduction="none")
    return losses_N


def _sizes(hidden_ND: Tensor, weight_VD: Tensor) -> tuple[int, int, torch.device]:
    return len(hidden_ND), len(weight_VD), hidden_ND.device


def _check(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor) -> None:
    if hidden_ND.ndim != 2 or weight_VD.ndim != 2 or hidden_ND.shape[1] != weight_VD.shape[1]:
        raise ValueError(f"hidden and weight must have shapes (N, D) and (V, D), got {tuple(hidden_ND.shape)} and {tuple(weight_VD.shape)}")
    if targets_N.shape != hidden_ND.shape[:1] or targets_N.dtype != torch.int64:
        raise ValueError(f"targets must be int64 of shape ({len(hidden_ND)},), got {targets_N.dtype} of shape {tuple(targets_N.shape)}")
