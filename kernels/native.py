"""Which tensors the operators compiled from csrc/ take.

These operators get bare addresses, so the caller must know what lies there. Every step asks about every
tensor of a model. So each question goes to a whole list at once: a loop in C answers it, in some 50 ns per
tensor.
"""

from collections.abc import Sequence
from functools import cache
from operator import attrgetter

import torch
from torch import Tensor

import lumi._csrc as _csrc

OLDEST_CAPABILITY = (8, 0)  # the oldest that setup.py compiles for and that the Triton kernels have tiles for
PLAIN_TYPES = {Tensor, torch.nn.Parameter}  # any other type may keep its elements elsewhere, as DTensor does

_device, _dtype = attrgetter("device"), attrgetter("dtype")


def has_native(device: torch.device) -> bool:
    """Whether there is compiled code for `device`.

    There always is for the CPU. For CUDA there is if Lumi was installed with an nvcc and the GPU's compute
    capability is at least 8.0.
    """
    if device.type != "cuda" or not _csrc.has_cuda:
        return device.type == "cpu"
    return capability(device) >= OLDEST_CAPABILITY


def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of a CUDA device, such as (9, 0); each is asked once."""
    return _capability(torch.cuda.current_device() if device.index is None else device.index)


def native_device(tensors: Sequence[Tensor], dtype: torch.dtype = torch.float32) -> torch.device | None:
    """The device that all of `tensors` are on, if compiled code can take them; else None.

    It takes plain, contiguous tensors of `dtype` on one device that has compiled code. No tensors: None.
    """
    if not tensors or not PLAIN_TYPES.issuperset(map(type, tensors)):
        return None
    devices, dtypes = list(map(_device, tensors)), list(map(_dtype, tensors))
    alike = devices.count(devices[0]) == len(tensors) and dtypes.count(dtype) == len(tensors)
    takes = alike and has_native(devices[0]) and all(map(Tensor.is_contiguous, tensors))
    return devices[0] if takes else None


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
