"""The L2 norm of many tensors taken as one vector, for gradient clipping.

    norm = sqrt(sum over tensors and elements of x^2)

Precision: squares are summed in float64 whatever the dtype, so neither many small terms nor large magnitudes are lost.
Deterministic: the order of summation depends on the sizes alone, not on the number of threads (csrc/global_norm.cpp).
"""

from collections.abc import Iterable

import torch
from torch import Tensor

import lumi._csrc as _csrc


def global_norm_reference(tensors: Iterable[Tensor]) -> Tensor:
    """The norm as a float64 scalar on the first tensor's device (CPU if there is none), without waiting for that device."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=torch.float64) for tensor in tensors]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm over all elements of `tensors`.

    Plain contiguous float32 tensors on the CPU go to C++ when all of them are such; anything else (another device or dtype, other
    strides, a tensor subclass such as DTensor) goes to `global_norm_reference`. Errors in either are raised, never retried in the other.

    Args:
        tensors: any number of floating tensors of any shapes. NaN and inf propagate; empty tensors count as zero.

    Returns:
        scalar float64 tensor: on CPU, or for the reference on the first tensor's device.

    Raises:
        ValueError: if an element is not a tensor of a real floating dtype.
    """
    tensors = list(tensors)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"tensors[{index}] must be a floating-point tensor, got {got}")
    if not all(map(_is_native, tensors)):
        return global_norm_reference(tensors)
    pointers = [tensor.data_ptr() for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    norm = _csrc.global_norm(pointers, sizes, torch.get_num_threads())
    return torch.tensor(norm, dtype=torch.float64)


def _is_native(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, torch.nn.Parameter)
    return plain and tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
