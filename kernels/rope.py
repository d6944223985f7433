"""Rotary position embedding, half-split convention (as Hugging Face's LLaMA).

    q' = q * cos + rotate_half(q) * sin,   rotate_half((a, b)) = (-b, a)   with a, b the two halves of a head
    angle(position, i) = position * theta^(-2i / K),   i = 0 ... K/2 - 1, the same for both halves

Su et al. 2021, https://arxiv.org/abs/2104.09864. The half-split order permutes the paper's interleaved pairs.
`lumi.kernels.rope_scaling` slows frequencies down for texts longer than those of pre-training.

Shape letters: B batch, T tokens, H query heads, G kv heads, K head dim.
Precision: angles and rotation in float32 (float64 stays float64), cast once. Angles are rounded exactly as
transformers' `LlamaRotaryEmbedding` rounds them, so logits of an exported model agree to float32 rounding.
Cost: q and k are read and written once, in one launch. The first halves of cos and sin are read once per 4
heads. The backward is the same rotation by the negative angle; only the tables are kept for it.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor

from lumi.kernels.custom_operator import custom_operator
from lumi.kernels.native import address, check_taken, cpu_operators
from lumi.kernels.optional_triton import tl, triton
from lumi.kernels.rope_scaling import RopeScaling

_TILE = 1024  # elements of each half of a head that a program turns at a time
_HEADS = 4  # heads that a program turns, one after the other, with one load of cosines and sines
_NUM_WARPS = 4


def rope_table(
    positions: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines for every token, computed once per batch and shared by all layers.

    Args:
        positions: (B, T) int64, position of each token inside its document, >= 0.
        head_dim: K, even.
        theta: base of the geometric progression of wavelengths, in tokens / (2 pi); > 0.
        scaling: None: the frequencies as they are.

    Returns:
        cos, sin: (B, T, K) float32, the K/2 angles repeated for both halves; times the scaling's attention
        factor.

    Raises:
        ValueError: if `positions` is not (B, T), or `head_dim` is odd or not positive.
    """
    if positions.ndim != 2:
        raise ValueError(f"positions must have shape (B, T), got {tuple(positions.shape)}")
    if head_dim <= 0 or head_dim % 2:
        raise ValueError(f"head_dim must be even and positive, got {head_dim}")
    exponents = torch.arange(0, head_dim, 2, device=positions.device).float() / head_dim
    periods = theta**exponents
    frequencies = 1.0 / periods if scaling is None else scaling.frequencies(periods, theta)
    angles = positions[..., None].float() * frequencies
    angles_BTK = torch.cat((angles, angles), dim=-1)
    cos, sin = angles_BTK.cos(), angles_BTK.sin()
    if scaling is None or scaling.attention_factor == 1:
        return cos, sin
    return cos * scaling.attention_factor, sin * scaling.attention_factor


# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def rope_reference(q_BTHK: Tensor, k_BTGK: Tensor, cos_BTK: Tensor, sin_BTK: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries (B, T, H, K) and keys (B, T, G, K) by cos and sin (B, T, K) float32; dtypes are kept."""

    def rotate(x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        first, second = x.to(wide).chunk(2, dim=-1)
        rotated = torch.cat((-second, first), dim=-1)
        return (x * cos_BTK[:, :, None].to(wide) + rotated * sin_BTK[:, :, None].to(wide)).to(x.dtype)

    return rotate(q_BTHK), rotate(k_BTGK)


# --- Triton kernel: a tile of tokens, and some of the heads of q and k together ---


@triton.jit(do_not_specialize=["N"])  # one compilation for every number of tokens
@no_type_check
def _rope_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    stride_qn, stride_qh, stride_kn, stride_kh, stride_tn,
    stride_q_outn, stride_q_outh, stride_k_outn, stride_k_outh,
    N, H, G,
    SIGN: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # int64: N * H * K can exceed 2**31.
    tokens = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.arange(0, BLOCK_K)
    mask = (tokens < N)[:, None] & (cols < HALF)[None, :]
    cos = tl.load(cos_ptr + tokens[:, None] * stride_tn + cols[None, :], mask=mask, other=0.0)
    sin = tl.load(sin_ptr + tokens[:, None] * stride_tn + cols[None, :], mask=mask, other=0.0) * SIGN

    for index in tl.static_range(HEADS):
        head = tl.program_id(1) * HEADS + index
        if head < H:
            q_ptrs = q_ptr + head * stride_qh + tokens[:, None] * stride_qn + cols[None, :]
            out_ptrs = q_out_ptr + head * stride_q_outh + tokens[:, None] * stride_q_outn + cols[None, :]
            _turn(q_ptrs, out_ptrs, cos, sin, mask, HALF)
        elif head < H + G:
            k_ptrs = k_ptr + (head - H) * stride_kh + tokens[:, None] * stride_kn + cols[None, :]
            out_ptrs = (
                k_out_ptr + (head - H) * stride_k_outh + tokens[:, None] * stride_k_outn + cols[None, :]
            )
            _turn(k_ptrs, out_ptrs, cos, sin, mask, HALF)


@triton.jit
@no_type_check
def _turn(x_ptrs, y_ptrs, cos, sin, mask, HALF: tl.constexpr):
    first = tl.load(x_ptrs, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptrs + HALF, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptrs, first * cos - second * sin, mask=mask)
    tl.store(y_ptrs + HALF, second * cos + first * sin, mask=mask)


# --- launcher: allocate, pick block sizes, launch. Never autograd. ---


def tile_config(K: int) -> dict[str, int]:
    """HALF, HEADS, BLOCK_N, BLOCK_K and num_warps for heads of K elements."""
    block_k = triton.next_power_of_2(K // 2)
    return {
        "HALF": K // 2,
        "HEADS": _HEADS,
        "BLOCK_N": max(_TILE // block_k, 1),
        "BLOCK_K": block_k,
        "num_warps": _NUM_WARPS,
    }


def _tokens(x_BTHK: Tensor) -> Tensor:
    """(B, T, H, K) as (N, H, K) with unit stride in a head: a view if one stride can walk the tokens, else a
    copy."""
    x_NHK = x_BTHK.reshape(-1, *x_BTHK.shape[2:])
    return x_NHK if x_NHK.stride(2) == 1 else x_NHK.contiguous()


def rope_launch(
    q_NHK: Tensor, k_NGK: Tensor, cos_NK: Tensor, sin_NK: Tensor, sign: int
) -> tuple[Tensor, Tensor]:
    """Returns q and k turned by `sign` times the angle, contiguous.

    Strides of tokens and heads are free; within a head the stride is 1.
    """
    N, H, K = q_NHK.shape
    q_out, k_out = (torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in (q_NHK, k_NGK))
    config = tile_config(K)
    grid = (triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(H + k_NGK.shape[1], _HEADS))
    strides = (
        *q_NHK.stride()[:2],
        *k_NGK.stride()[:2],
        cos_NK.stride(0),
        *q_out.stride()[:2],
        *k_out.stride()[:2],
    )
    with torch.cuda.device_of(q_NHK):  # Triton launches on the current device, which need not be q's
        _rope_kernel[grid](
            q_NHK, k_NGK, cos_NK, sin_NK, q_out, k_out, *strides, N, H, k_NGK.shape[1], SIGN=sign, **config
        )
    return q_out, k_out


# --- C++ for CPUs: the same, by csrc/cpu/rope.h ---


def native_rope(
    q_NHK: Tensor, k_NGK: Tensor, cos_NK: Tensor, sin_NK: Tensor, sign: int
) -> tuple[Tensor, Tensor]:
    """As `rope_launch`."""
    outputs = []
    for x in (q_NHK, k_NGK):
        y = torch.empty(x.shape, dtype=x.dtype)
        addresses = map(address, (x, cos_NK, sin_NK, y))
        cpu_operators(x.dtype).rope(*addresses, *x.shape, *x.stride()[:2], sign, torch.get_num_threads())
        outputs.append(y)
    return outputs[0], outputs[1]


# --- registration: torch.compile, checkpointing and FSDP2 see one opaque operator with known shapes ---


@custom_operator("lumi::rope")
def _rope_op(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int, native: bool = False
) -> tuple[Tensor, Tensor]:
    cos_NK, sin_NK = (t.reshape(-1, t.shape[-1]).contiguous() for t in (cos, sin))
    q_out, k_out = (native_rope if native else rope_launch)(_tokens(q), _tokens(k), cos_NK, sin_NK, sign)
    return q_out.view(q.shape), k_out.view(k.shape)


@_rope_op.register_fake
def _(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, sign: int, native: bool = False
) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, _, cos, sin, ctx.sign, ctx.native = inputs
    ctx.save_for_backward(cos, sin)


def _backward(ctx: Any, dq: Tensor, dk: Tensor) -> tuple[Tensor | None, ...]:
    return *_rope_op(dq, dk, *ctx.saved_tensors, -ctx.sign, ctx.native), None, None, None, None


_rope_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate queries and keys by the angles of their positions.

    Args:
        q: queries (B, T, H, K), float32 / bfloat16 / float16, any strides; K even.
        k: keys (B, T, G, K), dtype and device of `q`.
        cos, sin: (B, T, K) float32 as `rope_table` makes them, both halves of K alike: only the first is
            read.

    Returns:
        q and k turned, same shapes and dtype, contiguous. Differentiable in q and k.

    Raises:
        ValueError: if shapes, dtypes or devices do not fit each other, or K is odd.

    Source: Su et al. 2021, https://arxiv.org/abs/2104.09864.
    """
    _check(q, k, cos, sin)
    return _rope_op(q, k, cos, sin, 1)


def rope_native(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """As `rope`, in C++: float32 or bfloat16 on a CPU."""
    check_taken(q, k)
    _check(q, k, cos, sin)
    return _rope_op(q, k, cos, sin, 1, True)


def _check(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> None:
    fits = q.ndim == k.ndim == 4 and k.shape[:2] == q.shape[:2] and k.shape[3] == q.shape[3]
    if not fits or q.shape[3] % 2 or q.shape[3] == 0:
        raise ValueError(
            "q and k must have shapes (B, T, H, K) and (B, T, G, K), K even, "
            f"got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if k.dtype != q.dtype or q.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(
            f"q and k must be of one dtype, float32, bfloat16 or float16, got {q.dtype} and {k.dtype}"
        )
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape != (*q.shape[:2], q.shape[3]) or table.dtype != torch.float32:
            expected = (*q.shape[:2], q.shape[3])
            raise ValueError(
                f"{name} must be float32 of shape {expected}, got {table.dtype} of shape {tuple(table.shape)}"
            )
    if not q.device == k.device == cos.device == sin.device:
        raise ValueError(
            "q, k, cos and sin must be on one device, "
            f"got {q.device}, {k.device}, {cos.device} and {sin.device}"
        )
