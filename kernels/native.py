"""Which tensors the operators compiled from csrc/ take. They get bare addresses, so whoever calls them must know what lies there.

A step asks this of every tensor of a model: each question is put to a whole list by a loop in C, at some 50 ns a tensor.
"""

from collections.abc import Sequence
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor

import lumi._csrc as _csrc

OLDEST_CAPABILITY = (
    8,
    0,
)  # the oldest that setup.py compiles for, and that the Triton kernels have tiles for
PLAIN_TYPES = {Tensor, torch.nn.Parameter}  # any other type may keep its elements elsewhere, as DTensor does

_device, _dtype = attrgetter("device"), attrgetter("dtype")


def has_native(device: torch.device) -> bool:
    """Whether there is compiled code for `device`: for the CPU always, for CUDA where Lumi was installed with an nvcc and the GPU's
    compute capability is at least 8.0."""
    if device.type != "cuda" or not _csrc.has_cuda:
        return device.type == "cpu"
    return capability(device) >= OLDEST_CAPABILITY


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as (9, 0); each is asked once."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def native_device(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> torch.device | None:
    """The device that all of `tensors` are on, if compiled code can take them: plain, contiguous, of `dtype`, on one device which there
    is compiled code for. Otherwise, and where there are no tensors, None."""
    if not tensors or not PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    devices, dtypes = list(map(_device, tensors)), list(map(_dtype, tensors))
    alike = devices.count(devices[0]) == len(tensors) and dtypes.count(dtype) == len(tensors)
    return (
        devices[0] if alike and has_native(devices[0]) and all(map(Tensor.is_contiguous, tensors)) else None
    )


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
