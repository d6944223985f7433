"""Kernel tests only: what a kernel leaves unwritten is NaN, and the interpreter knows bfloat16."""

import os

import pytest
import torch

from lumi import _csrc
from lumi.kernels import native
from lumi.kernels.optional_triton import HAS_TRITON

INTERPRETED = HAS_TRITON and os.environ["TRITON_INTERPRET"] == "1"

# By default the processor's best set of instructions and that of all processors; those between in the soak.
CPU_TARGETS = [
    pytest.param(float32.target, marks=[pytest.mark.soak] if 0 < index < len(_csrc.cpu_targets) - 1 else [])
    for index, (float32, _) in enumerate(_csrc.cpu_targets)
]

with torch.device("cpu"):  # torch lists its constructors once: not while one of them is replaced
    torch.empty(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill new tensors with NaN (of integers: numbers that lead nowhere), so that a kernel that leaves part
    of its output unwritten fails."""

    def poisoned(tensor):
        if tensor.is_floating_point() and not tensor.requires_grad:
            return tensor.fill_(float("nan"))
        if tensor.dtype in (torch.int32, torch.int64):
            return tensor.fill_(torch.iinfo(tensor.dtype).max // 3)
        return tensor

    def replace(owner, name):
        real = getattr(owner, name)
        monkeypatch.setattr(owner, name, lambda *args, **kwargs: poisoned(real(*args, **kwargs)))

    for name in ("empty", "empty_like", "empty_strided"):
        replace(torch, name)
    replace(torch.Tensor, "new_empty")


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch):
    """Triton's interpreter with right bfloat16; a GPU has it."""
    if INTERPRETED:
        import interpreted_numbers

        interpreted_numbers.install_bfloat16(monkeypatch)


@pytest.fixture(params=CPU_TARGETS)
def cpu_target(request, monkeypatch):
    """The operators for CPUs under one set of instructions."""
    tables = next(tables for tables in _csrc.cpu_targets if tables[0].target == request.param)
    monkeypatch.setattr(native, "_operators", dict(zip((torch.float32, torch.bfloat16), tables, strict=True)))
