"""The operators that a model is built with, as one frozen bundle.

The model never asks which device it is on: it calls the bundle that it was given. Parity is the same weights
under two bundles.

Shape letters: B batch, T query tokens, S cache slots, D model dim, H query heads, G kv heads, K head dim,
F mlp dim, V vocabulary, N = B * T rows, I and O features in and out of a linear, R LoRA rank.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from lumi.kernels.add_rms_norm import add_rms_norm, add_rms_norm_native, add_rms_norm_reference
from lumi.kernels.attention import MAX_K, attention, attention_native, attention_reference
from lumi.kernels.attention_plan import attention_plan, attention_plan_reference
from lumi.kernels.chunked_cross_entropy import chunked_cross_entropy
from lumi.kernels.decode_attention import (
    decode_attention,
    decode_attention_native,
    decode_attention_reference,
)
from lumi.kernels.linear import linear_native, linear_reference
from lumi.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_native
from lumi.kernels.lora_linear import lora_linear, lora_linear_reference
from lumi.kernels.native import OLDEST_CAPABILITY, capability, has_cpu_operators
from lumi.kernels.optional_triton import HAS_TRITON
from lumi.kernels.rms_norm import rms_norm, rms_norm_native, rms_norm_reference
from lumi.kernels.rope import rope, rope_native, rope_reference
from lumi.kernels.swiglu import swiglu, swiglu_native, swiglu_reference
from lumi.kernels.token_losses import token_losses, token_losses_chunked, token_losses_native


class RMSNorm(Protocol):
    """y (..., D) from x (..., D) and weight (D,)."""

    def __call__(self, x: Tensor, weight: Tensor, eps: float = ...) -> Tensor: ...


class AddRMSNorm(Protocol):
    """y and total (..., D) from x and residual (..., D) and weight (D,): total = x + residual, y its
    RMSNorm."""

    def __call__(
        self, x: Tensor, residual: Tensor, weight: Tensor, eps: float = ...
    ) -> tuple[Tensor, Tensor]: ...


class Rope(Protocol):
    """Rotated q (B, T, H, K) and k (B, T, G, K) from q, k, and cos and sin (B, T, K) float32."""

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, /) -> tuple[Tensor, Tensor]: ...


class AttentionPlan(Protocol):
    """What the bundle's `attention` takes, from cu_seqlens (num_documents + 1,) int32 or None."""

    def __call__(
        self,
        cu_seqlens: Tensor | None,
        batch: int,
        length: int,
        device: torch.device | str,
        window: int | None = None,
    ) -> Any: ...


class Attention(Protocol):
    """y (B, T, H, K) from q (B, T, H, K), k and v (B, T, G, K) and a plan of the bundle's
    `attention_plan`."""

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, plan: Any, /) -> Tensor: ...


class DecodeAttention(Protocol):
    """y (B, T, H, K) from q (B, T, H, K), caches (B, S, G, K) and positions (B, T).

    With a page table (B, max_pages) int32 the caches are (num_pages, page_size, G, K). With a window, a query
    sees its own slot and the window - 1 slots before it.
    """

    def __call__(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        positions: Tensor,
        page_table: Tensor | None = None,
        window: int | None = None,
        /,
    ) -> Tensor: ...


class SwiGLU(Protocol):
    """y (..., F) from gate and up (..., F)."""

    def __call__(self, gate: Tensor, up: Tensor) -> Tensor: ...


class Linear(Protocol):
    """y (..., O) from x (..., I), weight (O, I) and bias (O,), both of any floating dtype."""

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None, /) -> Tensor: ...


class LoraLinear(Protocol):
    """One y_i (..., O_i) for each weight, from x (..., I), weights (O_i, I), As (R_i, I) and Bs (O_i,
    R_i)."""

    def __call__(
        self,
        x: Tensor,
        weights: Sequence[Tensor],
        As: Sequence[Tensor],
        Bs: Sequence[Tensor],
        scales: Sequence[float],
    ) -> list[Tensor]: ...


class LinearCrossEntropy(Protocol):
    """The summed loss, a scalar, from hidden (N, D), weight (V, D) and targets (N,) int64; `copy_VD` is the
    weight in hidden's dtype."""

    def __call__(
        self,
        hidden_ND: Tensor,
        weight_VD: Tensor,
        targets_N: Tensor,
        z_loss: float = 0.0,
        expected_dloss: float = 1.0,
        copy_VD: Tensor | None = None,
    ) -> Tensor: ...


class TokenLosses(Protocol):
    """The loss of each row (N,), from hidden (N, D), weight (V, D), targets (N,) int64 and `copy_VD`, as
    `LinearCrossEntropy`."""

    def __call__(
        self, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, copy_VD: Tensor | None = None
    ) -> Tensor: ...


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of every operator. The public functions of `TRITON`'s files document the arguments.

    `attention_plan` makes what `attention` takes; the two always come from one implementation.
    """

    name: str
    rms_norm: RMSNorm
    add_rms_norm: AddRMSNorm
    rope: Rope
    attention_plan: AttentionPlan
    attention: Attention
    decode_attention: DecodeAttention
    swiglu: SwiGLU
    linear: Linear
    lora_linear: LoraLinear
    linear_cross_entropy: LinearCrossEntropy
    token_losses: TokenLosses


REFERENCE = Ops(
    name="reference",
    rms_norm=rms_norm_reference,
    add_rms_norm=add_rms_norm_reference,
    rope=rope_reference,
    attention_plan=attention_plan_reference,
    attention=attention_reference,
    decode_attention=decode_attention_reference,
    swiglu=swiglu_reference,
    linear=linear_reference,
    lora_linear=lora_linear_reference,
    linear_cross_entropy=chunked_cross_entropy,
    token_losses=token_losses_chunked,
)

TRITON = Ops(
    name="triton",
    rms_norm=rms_norm,
    add_rms_norm=add_rms_norm,
    rope=rope,
    attention_plan=attention_plan,
    attention=attention,
    decode_attention=decode_attention,
    swiglu=swiglu,
    linear=linear_reference,  # torch's product is cuBLAS's
    lora_linear=lora_linear,  # not a kernel: fewer matrix products
    linear_cross_entropy=linear_cross_entropy,
    token_losses=token_losses,
)


NATIVE = Ops(
    name="native",
    rms_norm=rms_norm_native,
    add_rms_norm=add_rms_norm_native,
    rope=rope_native,
    attention_plan=attention_plan,
    attention=attention_native,
    decode_attention=decode_attention_native,
    swiglu=swiglu_native,
    linear=linear_native,
    lora_linear=lora_linear,
    linear_cross_entropy=linear_cross_entropy_native,
    token_losses=token_losses_native,
)


def select(name: str, device: torch.device | str, head_dim: int, dtype: torch.dtype) -> Ops:
    """The bundle called `name` for a model on `device`.

    Args:
        name: "reference", "native", "triton" or "auto". "auto" is triton on a GPU of compute capability 8.0
            or newer, for heads that its kernels take. It is native on a CPU, for float32 and bfloat16, where
            these operators were built. Elsewhere it is reference.
        device: where the model will run.
        head_dim: K, of the model.
        dtype: of the model's activations.

    Returns:
        `REFERENCE`, `NATIVE` or `TRITON`.

    Raises:
        ValueError: for another name, and where the operators of that name do not run: "native" on a device or
            for a dtype that "auto" does not take it for; "triton" without Triton, on a device that is not
            CUDA if TRITON_INTERPRET is not 1 (Triton's interpreter: slow, for tests), and for heads that its
            kernels do not take.
    """
    device = torch.device(device)
    if name not in ("auto", "reference", "native", "triton"):
        raise ValueError(f"kernels must be 'auto', 'reference', 'native' or 'triton', got {name!r}")
    if name == "native" or (name == "auto" and device.type == "cpu" and has_cpu_operators(dtype)):
        return _native(device, dtype)
    if name == "reference" or (name == "auto" and not _suits_triton(device, head_dim)):
        return REFERENCE
    return _triton(name, device, head_dim)


def _native(device: torch.device, dtype: torch.dtype) -> Ops:
    if device.type != "cpu" or not has_cpu_operators(dtype):
        raise ValueError(
            f"kernels must not be 'native' for {str(dtype).removeprefix('torch.')} on {device.type}: these "
            "operators are C++ for float32 and bfloat16 on CPUs, where Lumi was built with them (lumi doctor "
            "tells); take 'auto'"
        )
    return NATIVE


def _suits_triton(device: torch.device, head_dim: int) -> bool:
    return device.type == "cuda" and capability(device) >= OLDEST_CAPABILITY and _fits(head_dim)


def _fits(head_dim: int) -> bool:
    return head_dim <= MAX_K and head_dim % 8 == 0


def _triton(name: str, device: torch.device, head_dim: int) -> Ops:
    if not HAS_TRITON:
        raise ValueError(
            f"kernels must be 'reference' where Triton is not installed, got {name!r} on {device.type}"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels must be 'auto', 'native' or 'reference' on {device.type} (Triton needs CUDA), "
            f"got {name!r}"
        )
    if not _fits(head_dim):
        raise ValueError(
            f"head_dim must be a multiple of 8 up to {MAX_K} for kernels 'triton', got {head_dim}; "
            "'reference' takes any"
        )
    return TRITON
