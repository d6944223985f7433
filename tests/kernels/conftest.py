"""Kernel tests only: what a kernel leaves unwritten is NaN."""

import pytest
import torch

from lumi import _csrc
from lumi.kernels import native

# By default the processor's best set of instructions and that of all processors; those between in the soak.
CPU_TARGETS = [
    pytest.param(float32.target, marks=[pytest.mark.soak] if 0 < index < len(_csrc.cpu_targets) - 1 else [])
    for index, (float32, _) in enumerate(_csrc.cpu_targets)
]

with torch.device("cpu"):  # torch lists its constructors once: not while one of them is replaced
    torch.empty(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch):
    """Fill torch.empty and torch.empty_like with NaN, so that a kernel that leaves part of its output
    unwritten fails."""
    real_empty, real_empty_like = torch.empty, torch.empty_like

    def poisoned(tensor):
        return (
            tensor.fill_(float("nan")) if tensor.is_floating_point() and not tensor.requires_grad else tensor
        )

    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: poisoned(real_empty(*args, **kwargs)))
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **kwargs: poisoned(real_empty_like(*args, **kwargs))
    )


@pytest.fixture(params=CPU_TARGETS)
def cpu_target(request, monkeypatch):
    """The operators for CPUs under one set of instructions."""
    tables = next(tables for tables in _csrc.cpu_targets if tables[0].target == request.param)
    monkeypatch.setattr(native, "_operators", dict(zip((torch.float32, torch.bfloat16), tables, strict=True)))
