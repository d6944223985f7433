"""Kernel tests only: what a kernel leaves unwritten is NaN."""

import pytest
import torch

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
