"""The L2 norm of many tensors taken as one vector, for gradient clipping.

    norm = sqrt(sum over tensors and elements of x^2)

Precision: squares are summed in float64 whatever the dtype, so neither many small terms nor large magnitudes are lost.
Deterministic: the order of summation depends on the sizes alone, not on the number of threads (csrc/global_norm.cpp) or on where the
tensors lie (csrc/global_norm.cu).
Cost: one read of the tensors, 4 bytes for each element.
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

    Plain contiguous float32 tensors on one device, the CPU or (where Lumi was installed with an nvcc) CUDA, go to C++ or CUDA when all
    of them are such; anything else (another dtype, other strides, several devices, a tensor subclass such as DTensor) goes to
    `global_norm_reference`. Errors in either are raised, never retried in the other.

    Args:
        tensors: any number of floating tensors of any shapes. NaN and inf propagate; empty tensors count as zero.

    Returns:
        scalar float64 tensor on the first tensor's device (CPU if there is none), which nobody has waited for.

    Raises:
        ValueError: if an element is not a tensor of a real floating dtype.
    """
    tensors = list(tensors)
    for index, tensor in enumerate(tensors):
        if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
            got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
            raise ValueError(f"tensors[{index}] must be a floating-point tensor, got {got}")
    device = tensors[0].device if tensors else torch.device("cpu")
    native = device.type == "cpu" or (device.type == "cuda" and _csrc.has_cuda)
    if not native or not all(tensor.device == device and _is_native(tensor) for tensor in tensors):
        return global_norm_reference(tensors)
    pointers = [tensor.data_ptr() for tensor in tensors]
    sizes = [tensor.numel() for tensor in tensors]
    if device.type == "cpu":
        return torch.tensor(_csrc.global_norm(pointers, sizes, torch.get_num_threads()), dtype=torch.float64)
    with torch.cuda.device(device):
        norm = torch.empty((), dtype=torch.float64, device=device)
        partials = torch.empty(_csrc.global_norm_num_partials(sizes), dtype=torch.float64, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _csrc.global_norm_cuda(pointers, sizes, norm.data_ptr(), partials.data_ptr(), device.index, stream)
    return norm


def _is_native(tensor: Tensor) -> bool:
    return type(tensor) in (Tensor, torch.nn.Parameter) and tensor.dtype == torch.float32 and tensor.is_contiguous()
