"""Rotary position embedding, half-split convention (as Hugging Face's LLaMA).

    q' = q * cos + rotate_half(q) * sin,   rotate_half((a, b)) = (-b, a)   with a, b the two halves of a head
    angle(position, i) = position * theta^(-2i / K),   i = 0 ... K/2 - 1, the same for both halves

Su et al. 2021, https://arxiv.org/abs/2104.09864. The half-split order permutes the paper's interleaved pairs. Llama 3 slows the low
frequencies down, so that longer texts than those of pre-training stay within angles that it knows (Llama team 2024, arXiv:2407.21783).

Shape letters: B batch, T tokens, H query heads, G kv heads, K head dim.
Precision: angles and rotation in float32 (float64 stays float64), cast once. Angles are rounded exactly as transformers'
`LlamaRotaryEmbedding` rounds them, so logits of an exported model agree to float32 rounding.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Llama 3's slowing of low frequencies.

    Args:
        factor: how many times slower the lowest frequencies turn; at least 1.
        low_freq_factor: what turns fewer times than this in `original_max_positions` tokens is slowed by all of `factor`; > 0.
        high_freq_factor: what turns more often than this stays as it is, between them is interpolated; above `low_freq_factor`.
        original_max_positions: tokens that the model was pre-trained on.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self):
        if not 1 <= self.factor < math.inf:
            raise ValueError(f"factor must be at least 1, got {self.factor}")
        if not 0 < self.low_freq_factor < self.high_freq_factor < math.inf:
            raise ValueError(
                f"low_freq_factor must be positive and below high_freq_factor = {self.high_freq_factor}, got {self.low_freq_factor}"
            )
        if self.original_max_positions < 1:
            raise ValueError(f"original_max_positions must be at least 1, got {self.original_max_positions}")


def rope_table(positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token, computed once per batch and shared by all layers.

    Args:
        positions: (B, T) int64, position of each token inside its document, >= 0.
        head_dim: K, even.
        theta: base of the geometric progression of wavelengths, in tokens / (2 pi); > 0.
        scaling: None: the frequencies as they are.

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
    frequencies = 1.0 / (theta**exponents)
    if scaling is not None:
        frequencies = _slow_down(frequencies, scaling)
    angles = positions[..., None].float() * frequencies
    angles_BTK = torch.cat((angles, angles), dim=-1)
    return angles_BTK.cos(), angles_BTK.sin()


def _slow_down(frequencies: Tensor, scaling: RopeScaling) -> Tensor:
    """Frequencies (K/2,) in radians per token, rounded in the order of operations of transformers' `llama3` rope type."""
    wavelengths, known = 2 * math.pi / frequencies, scaling.original_max_positions
    weight = (known / wavelengths - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
    between = (1 - weight) * frequencies / scaling.factor + weight * frequencies
    slowed = torch.where(wavelengths > known / scaling.low_freq_factor, frequencies / scaling.factor, between)
    return torch.where(wavelengths < known / scaling.high_freq_factor, frequencies, slowed)


def rope_reference(q_BTHK: Tensor, k_BTGK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, T, H, K) and keys (B, T, G, K) by cos and sin (B, T, K) float32; dtypes are kept."""

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = x.to(wide).chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * cos_BTK[:, :, None].to(wide) + rotated * sin_BTK[:, :, None].to(wide)).to(x.dtype)

    return rotate(q_BTHK), rotate(k_BTGK)
