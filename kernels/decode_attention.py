"""Attention against a key-value cache, for prefill and decoding alike.

    y_bt = sum over s of softmax_s(q_bt . k_bs / sqrt(K)) v_bs,   s <= position of query t of row b

Shape letters: B batch, T new tokens, S cache slots, H query heads, G kv heads (H a multiple of G), K head dim.
Precision: as `attention.py`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def decode_attention_reference(q_BTHK: Tensor, k_cache_BSGK: Tensor, v_cache_BSGK: Tensor, positions_BT: Tensor) -> Tensor:
    """Attend from T new tokens to the cache slots up to each one's own.

    Args:
        q_BTHK: queries (B, T, H, K), already rotated.
        k_cache_BSGK: keys (B, S, G, K), the new tokens' already written to their slots. Slots not yet written must be finite
            (zeros): they get weight zero, and zero times NaN is NaN.
        v_cache_BSGK: values, likewise.
        positions_BT: (B, T) int64, the slot of each query, 0 <= position < S. Rows may stand at different positions.

    Returns:
        (B, T, H, K), dtype of q. Work grows with S: pass the used part of a large cache.

    Raises:
        ValueError: if the shapes do not fit each other.
    """
    B, T, H, K = q_BTHK.shape
    _, S, G, _ = k_cache_BSGK.shape
    if k_cache_BSGK.shape != (B, S, G, K) or v_cache_BSGK.shape != (B, S, G, K):
        raise ValueError(f"the caches must have shape {(B, 'S', 'G', K)}, got {tuple(k_cache_BSGK.shape)} and {tuple(v_cache_BSGK.shape)}")
    if positions_BT.shape != (B, T):
        raise ValueError(f"positions must have shape {(B, T)}, got {tuple(positions_BT.shape)}")
    if G == 0 or H % G:
        raise ValueError(f"query heads must be a multiple of kv heads, got {H} and {G}")
    visible_BTS = torch.arange(S, device=q_BTHK.device) <= positions_BT[..., None]
    y_BHTK = F.scaled_dot_product_attention(
        q_BTHK.transpose(1, 2),
        k_cache_BSGK.transpose(1, 2),
        v_cache_BSGK.transpose(1, 2),
        attn_mask=visible_BTS[:, None],
        enable_gqa=H != G,
    )
    return y_BHTK.transpose(1, 2)
