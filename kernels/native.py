"""Which tensors the operators compiled from csrc/ take, and how they are called.

These operators get bare addresses, so the caller must know what lies there. Every step asks about every
tensor of a model. So each question goes to a whole list at once: a loop in C answers it, in some 50 ns per
tensor.
"""

from collections.abc import Sequence
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from lumi.kernels.custom_operator import PLAIN_TYPES

# None where Lumi was installed without compiled code; an extension that does not load is an error. It comes
# after torch, whose threads it uses (setup.py).
csrc: Any = import_module("lumi._csrc") if find_spec("lumi._csrc") else None

OLDEST_CAPABILITY = (8, 0)  # the oldest that setup.py compiles for and that the Triton kernels have tiles for

_device, _dtype = attrgetter("device"), attrgetter("dtype")


def has_native(device: torch.device) -> bool:
    """Whether there is compiled code for `device`.

    There is for the CPU, unless Lumi was installed without a compiler (LUMI_PURE=1). For CUDA there is if it
    was installed with an nvcc and the GPU's compute capability is at least 8.0.
    """
    if csrc is None or device.type not in ("cpu", "cuda"):
        return False
    return device.type == "cpu" or (csrc.has_cuda and capability(device) >= OLDEST_CAPABILITY)


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


def has_cpu_operators(dtype: torch.dtype) -> bool:
    """Whether the operators of csrc/cpu were built and take activations of this type: float32 or bfloat16."""
    return dtype in _operators


def check_taken(*tensors: Tensor) -> None:
    """Raises ValueError unless the operators of csrc/cpu take these activations: of one type, on a CPU. They
    may have any strides."""
    dtype = tensors[0].dtype
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype != dtype or dtype not in _operators:
            raise ValueError(
                "the operators for CPUs take tensors of float32 or of bfloat16 on the CPU, "
                f"got {tensor.dtype} on {tensor.device}"
            )


def cpu_operators(dtype: torch.dtype) -> Any:
    """The operators of csrc/cpu on activations of this type: `operators.h` says what they
    take."""
    return _operators[dtype]


def address(tensor: Tensor | None) -> int:
    """Of a tensor's memory; 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()


_operators: dict[torch.dtype, Any] = {}  # of the best target that the processor has
if csrc is not None and csrc.cpu_targets:
    _operators.update(zip((torch.float32, torch.bfloat16), csrc.cpu_targets[0], strict=True))


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)
