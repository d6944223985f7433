"""Causal attention over packed documents, with grouped-query heads.

    y_t = sum over s of softmax_s(q_t . k_s / sqrt(K)) v_s,   s in the document of t and s <= t

Vaswani et al. 2017, https://arxiv.org/abs/1706.03762; grouped queries: Ainslie et al. 2023, https://arxiv.org/abs/2305.13245.

Shape letters: B batch rows, T tokens per row, H query heads, G kv heads (H a multiple of G), K head dim.
Query head h reads kv head h // (H / G).
Precision: softmax in float32 inside torch's kernel (float64 stays float64); the output takes the dtype of q.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Which token sees which, worked out once per batch and shared by all layers.

    `mask` (B, 1, T, T) is True where a query sees a key; None means plain causal rows, for which torch has a faster path.
    """

    batch: int
    length: int
    mask: Tensor | None


def attention_plan_reference(cu_seqlens: Tensor | None, batch: int, length: int, device: torch.device | str) -> AttentionPlan:
    """Turn document boundaries into a plan.

    Args:
        cu_seqlens: (num_documents + 1,) int32 offsets into the flattened batch * length tokens, from 0 to batch * length,
            non-decreasing, every row boundary among them (so no document spans two rows); equal neighbours are an empty
            document. None: each row is one document.
        batch: B, rows.
        length: T, tokens per row.
        device: where q, k and v will be.

    Returns:
        the plan that `attention_reference` takes.

    Raises:
        ValueError: if cu_seqlens is not int32 of one dimension, does not run from 0 to batch * length without falling, or leaves
            out a row boundary.
    """
    if cu_seqlens is None:
        return AttentionPlan(batch=batch, length=length, mask=None)
    _check_cu_seqlens(cu_seqlens, batch, length)
    num_tokens = batch * length
    offsets = cu_seqlens.to(device=device, dtype=torch.int64)
    # A token's document is the number of documents that end at or before it, which skips empty ones by itself.
    document_BT = torch.searchsorted(offsets[1:], torch.arange(num_tokens, device=device), right=True).view(batch, length)
    same_BTT = document_BT[:, :, None] == document_BT[:, None, :]
    causal_TT = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    return AttentionPlan(batch=batch, length=length, mask=(same_BTT & causal_TT)[:, None])


def _check_cu_seqlens(cu_seqlens: Tensor, batch: int, length: int) -> None:
    if cu_seqlens.dtype != torch.int32 or cu_seqlens.ndim != 1 or len(cu_seqlens) < 2:
        raise ValueError(
            f"cu_seqlens must be int32 of shape (num_documents + 1,), got {cu_seqlens.dtype} of shape {tuple(cu_seqlens.shape)}"
        )
    offsets = cu_seqlens.tolist()  # waits for the device once per batch, not once per layer
    if offsets[0] != 0 or offsets[-1] != batch * length or any(a > b for a, b in itertools.pairwise(offsets)):
        ends = f"{offsets[:3]} ... {offsets[-3:]}"
        raise ValueError(f"cu_seqlens must go from 0 to batch * length = {batch * length} without falling, got {ends}")
    missing = set(range(0, batch * length, length)) - set(offsets) if length else set()
    if missing:
        raise ValueError(f"cu_seqlens must contain every row boundary (multiples of {length}), got none at {min(missing)}")


def attention_reference(q_BTHK: Tensor, k_BTGK: Tensor, v_BTGK: Tensor, plan: AttentionPlan) -> Tensor:
    """Causal attention inside each document.

    Args:
        q_BTHK: queries (B, T, H, K), floating, already rotated.
        k_BTGK: keys (B, T, G, K), same dtype; G divides H.
        v_BTGK: values (B, T, G, K), same dtype.
        plan: from `attention_plan_reference` for this B and T.

    Returns:
        (B, T, H, K), dtype of q.

    Raises:
        ValueError: if the shapes do not fit each other or the plan.
    """
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    if (plan.batch, plan.length) != (B, T):
        raise ValueError(f"q must have the plan's batch and length ({plan.batch}, {plan.length}), got ({B}, {T})")
    if k_BTGK.shape != (B, T, G, K) or v_BTGK.shape != (B, T, G, K):
        raise ValueError(f"k and v must have shape {(B, T, 'G', K)}, got {tuple(k_BTGK.shape)} and {tuple(v_BTGK.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"query heads must be a multiple of kv heads, got {H} and {G}")
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_BTGK.transpose(1, 2),
        v_BTGK.transpose(1, 2),
        attn_mask=plan.mask,
        is_causal=plan.mask is None,
        enable_gqa=H != G,
    )
    return y_BHTK.transpose(1, 2)
