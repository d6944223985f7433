"""The operators that a model is built with, as one frozen bundle.

The model never asks which device it is on: it calls what it was given. Parity is the same weights under two bundles.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass

import torch

from lumi.kernels.add_rms_norm import add_rms_norm, add_rms_norm_reference
from lumi.kernels.attention import MAX_K, attention, attention_reference
from lumi.kernels.attention_plan import attention_plan, attention_plan_reference
from lumi.kernels.decode_attention import decode_attention, decode_attention_reference
from lumi.kernels.linear_cross_entropy import linear_cross_entropy, linear_cross_entropy_reference
from lumi.kernels.lora_linear import lora_linear, lora_linear_reference
from lumi.kernels.native import OLDEST_CAPABILITY, capability
from lumi.kernels.optional_triton import HAS_TRITON
from lumi.kernels.rms_norm import rms_norm, rms_norm_reference
from lumi.kernels.rope import rope, rope_reference
from lumi.kernels.swiglu import swiglu, swiglu_reference


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One implementation of every operator. Each field has the signature of the `*_reference` of its file.

    `attention_plan` makes what `attention` takes; the two always come from one implementation.
    """

    name: str
    rms_norm: Callable
    add_rms_norm: Callable
    rope: Callable
    attention_plan: Callable
    attention: Callable
    decode_attention: Callable
    swiglu: Callable
    lora_linear: Callable
    linear_cross_entropy: Callable


REFERENCE = Ops(
    name="reference",
    rms_norm=rms_norm_reference,
    add_rms_norm=add_rms_norm_reference,
    rope=rope_reference,
    attention_plan=attention_plan_reference,
    attention=attention_reference,
    decode_attention=decode_attention_reference,
    swiglu=swiglu_reference,
    lora_linear=lora_linear_reference,
    linear_cross_entropy=linear_cross_entropy_reference,
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
    lora_linear=lora_linear,  # not a kernel: fewer matrix products
    linear_cross_entropy=linear_cross_entropy,
)


def select(name: str, device: torch.device | str, head_dim: int) -> Ops:
    """The bundle called `name` for a model on `device`.

    Args:
        name: "reference", "triton", or "auto": triton on a GPU of compute capability 8.0 or newer, for heads that its kernels take;
            reference elsewhere.
        device: where the model will run.
        head_dim: K, of the model.

    Returns:
        `REFERENCE` or `TRITON`.

    Raises:
        ValueError: for another name; for "triton" where Triton is not installed, on a device other than CUDA without TRITON_INTERPRET=1
            (Triton's interpreter: slow, for tests), or for heads that its kernels do not take.
    """
    device = torch.device(device)
    if name not in ("auto", "reference", "triton"):
        raise ValueError(f"kernels must be 'auto', 'reference' or 'triton', got {name!r}")
    fits = head_dim <= MAX_K and head_dim % 8 == 0
    if name == "reference" or (
        name == "auto" and not (fits and device.type == "cuda" and capability(device) >= OLDEST_CAPABILITY)
    ):
        return REFERENCE
    if not HAS_TRITON:
        raise ValueError(
            f"kernels must be 'reference' where Triton is not installed, got {name!r} on {device.type}"
        )
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            f"kernels must be 'reference' or 'auto' on {device.type} (Triton needs CUDA), got {name!r}"
        )
    if not fits:
        raise ValueError(
            f"head_dim must be a multiple of 8 up to {MAX_K} for kernels 'triton', got {head_dim}; 'reference' takes any"
        )
    return TRITON
