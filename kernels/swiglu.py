"""SwiGLU, the gated activation between the two halves of the MLP.

    y = silu(gate) * up,   silu(z) = z * sigmoid(z),   sigmoid(z) = 1 / (1 + exp(-z))

    dgate = dy * up * s * (1 + gate * (1 - s)),   dup = dy * gate * s,   s = sigmoid(gate)

Shazeer 2020, https://arxiv.org/abs/2002.05202.

Shape letters: N rows (all leading dims flattened), F mlp dim.
Precision: float32 inside (the reference keeps float64 as float64), cast once.
Cost: forward reads gate and up once and writes y once. Backward reads dy, gate and up once and writes dgate
and dup once, side by side. It computes the sigmoid again, so only the inputs are kept.
"""

from typing import Any, no_type_check

import torch
from torch import Tensor
from torch.nn.functional import silu

from lumi.kernels.custom_operator import custom_operator
from lumi.kernels.native import address, check_taken, cpu_operators
from lumi.kernels.optional_triton import tl, triton
from lumi.kernels.strided_rows import strided_rows

_TILE = 1024  # elements of a program: 8 for each of its 128 threads
_NUM_WARPS = 4


# --- reference: the definition. Slow, obvious, any device, any dtype. ---


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """y (..., F) from gate and up (..., F) of one dtype, which y keeps."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)


# --- Triton kernels: a tile of BLOCK_N rows and BLOCK_F columns ---


@triton.jit(do_not_specialize=["N"])  # one compilation for every number of rows
@no_type_check
def _swiglu_fwd_kernel(
    gate_ptr, up_ptr, y_ptr,
    stride_gaten, stride_upn, stride_yn,
    N, F,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)  # int64: N * F can exceed 2**31
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    gate = tl.load(gate_ptr + rows[:, None] * stride_gaten + cols[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    up = tl.load(up_ptr + rows[:, None] * stride_upn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + rows[:, None] * stride_yn + cols[None, :], gate / (1.0 + tl.exp(-gate)) * up, mask=mask)


@triton.jit(do_not_specialize=["N"])
@no_type_check
def _swiglu_bwd_kernel(
    dy_ptr, gate_ptr, up_ptr, dgate_ptr, dup_ptr,
    stride_dyn, stride_gaten, stride_upn, stride_dgaten, stride_dupn,
    N, F,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = tl.program_id(1) * BLOCK_F + tl.arange(0, BLOCK_F)
    mask = (rows < N)[:, None] & (cols < F)[None, :]
    dy = tl.load(dy_ptr + rows[:, None] * stride_dyn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + rows[:, None] * stride_gaten + cols[None, :], mask=mask, other=0.0).to(
        tl.float32
    )
    up = tl.load(up_ptr + rows[:, None] * stride_upn + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    tl.store(
        dgate_ptr + rows[:, None] * stride_dgaten + cols[None, :],
        dy * up * sigmoid * (1.0 + gate * (1.0 - sigmoid)),
        mask=mask,
    )
    tl.store(dup_ptr + rows[:, None] * stride_dupn + cols[None, :], dy * gate * sigmoid, mask=mask)


# --- launchers: allocate, pick block sizes, launch. Never autograd. ---


def tile_config(F: int) -> dict[str, int]:
    """BLOCK_N, BLOCK_F and num_warps for rows of F elements. Narrow rows share a program; wide ones are
    cut."""
    block_f = min(triton.next_power_of_2(F), _TILE)
    return {"BLOCK_N": _TILE // block_f, "BLOCK_F": block_f, "num_warps": _NUM_WARPS}


def _grid(N: int, F: int, config: dict[str, int]) -> tuple[int, int]:
    return triton.cdiv(N, config["BLOCK_N"]), triton.cdiv(F, config["BLOCK_F"])


def swiglu_fwd(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Returns y_NF in gate's dtype. The inputs may have any row stride; within a row the stride is 1."""
    N, F = gate_NF.shape
    y_NF = torch.empty(N, F, dtype=gate_NF.dtype, device=gate_NF.device)
    config = tile_config(F)
    with torch.cuda.device_of(gate_NF):  # Triton launches on the current device, which need not be gate's
        _swiglu_fwd_kernel[_grid(N, F, config)](
            gate_NF, up_NF, y_NF, gate_NF.stride(0), up_NF.stride(0), y_NF.stride(0), N, F, **config
        )
    return y_NF


def swiglu_bwd(dy_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """Returns dgate_NF and dup_NF in gate's dtype, side by side in one tensor. Writes to no input."""
    N, F = gate_NF.shape
    both = torch.empty(N, 2 * F, dtype=gate_NF.dtype, device=gate_NF.device)
    tensors = (dy_NF, gate_NF, up_NF, *both.chunk(2, dim=1))
    config = tile_config(F)
    with torch.cuda.device_of(gate_NF):
        _swiglu_bwd_kernel[_grid(N, F, config)](*tensors, *(t.stride(0) for t in tensors), N, F, **config)
    return both


# --- C++ for CPUs: the same, by csrc/cpu/swiglu.h ---


def native_swiglu_fwd(gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """As `swiglu_fwd`."""
    y_NF = torch.empty(gate_NF.shape, dtype=gate_NF.dtype)
    cpu_operators(gate_NF.dtype).swiglu(
        *map(address, (gate_NF, up_NF, y_NF)),
        *gate_NF.shape,
        gate_NF.stride(0),
        up_NF.stride(0),
        torch.get_num_threads(),
    )
    return y_NF


def native_swiglu_bwd(dy_NF: Tensor, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
    """As `swiglu_bwd`."""
    (N, F), inputs = gate_NF.shape, (dy_NF, gate_NF, up_NF)
    both = torch.empty(N, 2 * F, dtype=gate_NF.dtype)
    cpu_operators(gate_NF.dtype).swiglu_backward(
        *map(address, (*inputs, both)), N, F, *(t.stride(0) for t in inputs), torch.get_num_threads()
    )
    return both


# --- registration: torch.compile, checkpointing and FSDP2 see two opaque operators with known shapes ---


@custom_operator("lumi::swiglu")
def _swiglu_op(gate: Tensor, up: Tensor, native: bool = False) -> Tensor:
    launch = native_swiglu_fwd if native else swiglu_fwd
    return launch(strided_rows(gate), strided_rows(up)).view(gate.shape)


@custom_operator("lumi::swiglu_backward")
def _swiglu_backward_op(dy: Tensor, gate: Tensor, up: Tensor, native: bool = False) -> Tensor:
    """Returns [dgate, dup] (..., 2 F). A product that computed gate and up takes it as it is."""
    launch = native_swiglu_bwd if native else swiglu_bwd
    both = launch(strided_rows(dy), strided_rows(gate), strided_rows(up))
    return both.view(*gate.shape[:-1], 2 * gate.shape[-1])


@_swiglu_op.register_fake
def _(gate: Tensor, up: Tensor, native: bool = False) -> Tensor:
    return gate.new_empty(gate.shape)


@_swiglu_backward_op.register_fake
def _(dy: Tensor, gate: Tensor, up: Tensor, native: bool = False) -> Tensor:
    return gate.new_empty(*gate.shape[:-1], 2 * gate.shape[-1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.native = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_swiglu_backward_op(dy, *ctx.saved_tensors, ctx.native).chunk(2, dim=-1), None


_swiglu_op.register_autograd(_backward, setup_context=_save)


# --- the public function ---


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up.

    Args:
        gate, up: (..., F), float32 / bfloat16 / float16, any strides; of one shape, dtype and device. 1 <= F.

    Returns:
        y (..., F), dtype of `gate`, contiguous. Differentiable once, in both.

    Raises:
        ValueError: if shapes, dtypes or devices differ, a dtype is none of the three, or there is no last
            dimension.



    Source: Shazeer 2020, https://arxiv.org/abs/2002.05202.
    """
    _check(gate, up)
    return _swiglu_op(gate, up)


def swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    """As `swiglu`, in C++: float32 or bfloat16 on a CPU."""
    check_taken(gate, up)
    _check(gate, up)
    return _swiglu_op(gate, up, True)


def _check(gate: Tensor, up: Tensor) -> None:
    if gate.ndim == 0 or gate.shape[-1] == 0:
        raise ValueError(f"gate must have a last dimension of at least 1, got shape {tuple(gate.shape)}")
    if up.shape != gate.shape or up.dtype != gate.dtype or up.device != gate.device:
        raise ValueError(
            "up must have shape, dtype and device of gate, "
            f"{tuple(gate.shape)}, {gate.dtype}, {gate.device}, "
            f"got {tuple(up.shape)}, {up.dtype}, {up.device}"
        )
    if gate.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"gate must be float32, bfloat16 or float16, got {gate.dtype}")
