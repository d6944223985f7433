"""The L2 norm of many tensors taken as one vector, for gradient clipping.

    norm = sqrt(sum over tensors and elements of x^2)

Precision: squares are summed in float64 whatever the dtype, so neither many small terms nor large magnitudes
are lost.
Deterministic: the order of summation depends on the sizes alone. It does not depend on the number of threads
(csrc/global_norm.cpp) or on where the tensors lie (csrc/global_norm.cu).
Cost: one read of the tensors, 4 bytes per element.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from lumi.kernels.native import csrc as _csrc
from lumi.kernels.native import native_device
from lumi.kernels.wide_float import wide_float


def global_norm_reference(tensors: Iterable[Tensor]) -> Tensor:
    """The definition. Returns a `wide_float` scalar on the first tensor's device (CPU if there is none)."""
    norms = [torch.linalg.vector_norm(tensor.detach(), dtype=wide_float(tensor.device)) for tensor in tensors]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """The L2 norm over all elements of `tensors`.

    If all tensors are plain, contiguous and float32 on one device, C++ or CUDA code takes them
    (`native_device`).
    Anything else goes to `global_norm_reference`: another dtype, other strides, several devices, a tensor
    subclass such as DTensor, a GPU without compiled code. An error in either is raised; the other is not
    tried.

    A CUDA graph keeps the tensors' addresses as they were at capture. Call this once before a capture: the
    first call loads the kernels.

    Args:
        tensors: any number of floating tensors of any shapes. NaN and inf propagate. Empty tensors count as
            zero.

    Returns:
        scalar tensor of `wide_float` on the first tensor's device (CPU if there is none). The call does not
        wait for it.

    Raises:
        ValueError: if an element is not a tensor of a real floating dtype.
    """
    tensors = list(tensors)
    device = native_device(tensors)
    if device is None:
        for index, tensor in enumerate(tensors):
            if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
                got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
                raise ValueError(f"tensors[{index}] must be a floating-point tensor, got {got}")
        return global_norm_reference(tensors)
    pointers, sizes = list(map(Tensor.data_ptr, tensors)), list(map(Tensor.numel, tensors))
    if device.type == "cpu":
        return torch.tensor(_csrc.global_norm(pointers, sizes, torch.get_num_threads()), dtype=torch.float64)
    with torch.cuda.device(device):
        norm = torch.empty((), dtype=torch.float64, device=device)
        partials = torch.empty(_csrc.global_norm_num_partials(sizes), dtype=torch.float64, device=device)
        stream = torch.cuda.current_stream(device).cuda_stream
        _csrc.global_norm_cuda(pointers, sizes, norm.data_ptr(), partials.data_ptr(), device.index, stream)
    return norm
