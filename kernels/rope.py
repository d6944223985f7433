"""Rotary position embedding, half-split convention (as Hugging Face's LLaMA).

    q' = q * cos + rotate_half(q) * sin,   rotate_half((a, b)) = (-b, a)   with a, b the two halves of a head
    angle(position, i) = position * theta^(-2i / K),   i = 0 ... K/2 - 1, the same for both halves

Su et al. 2021, https://arxiv.org/abs/2104.09864. The half-split order permutes the paper's interleaved pairs.

Shape letters: B batch, T tokens, H query heads, G kv heads, K head dim.
Precision: angles and rotation in float32 (float64 stays float64), cast once. Angles are rounded exactly as transformers'
`LlamaRotaryEmbedding` rounds them, so logits of an exported model agree to float32 rounding.
"""

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token, computed once per batch and shared by all layers.

    Args:
        positions: (B, T) int64, position of each token inside its document, >= 0.
        head_dim: K, even.
        theta: base of the geometric progression of wavelengths, in tokens / (2 pi); > 0.

    Returns:
        cos, sin: (B, T, K) float32, the K/2 angles repeated for both halves.

    Raises:
        ValueError: if `positions` is not (B, T), or `head_dim` is odd or not positive.
    """
    if positions.ndim != 2:
        raise ValueError(f"positions must have shape (B, T), got {tuple(positions.shape)}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    inverse_frequencies = 1.0 / (theta**exponents)
    angles = positions[..., None].float() * inverse_frequencies
    angles_BTK = torch.cat((angles, angles), dim=-1)
    return angles_BTK.cos(), angles_BTK.sin()


def rope_reference(q_BTHK: Tensor, k_BTGK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, T, H, K) and keys (B, T, G, K) by cos and sin (B, T, K) float32; dtypes are kept."""

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = x.to(wide).chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * cos_BTK[:, :, None].to(wide) + rotated * sin_BTK[:, :, None].to(wide)).to(x.dtype)

    return rotate(q_BTHK), rotate(k_BTGK)
