"""Numerical parity: a kernel may be at most `slack` times worse than the same math in the same dtype, judged
by float64."""

import pytest
import torch
from torch import Tensor

# What the Triton kernels are tested in. In the interpreter float16 is left to the soak.
DTYPES = [
    torch.float32,
    torch.bfloat16,
    pytest.param(torch.float16, marks=[] if torch.cuda.is_available() else [pytest.mark.soak]),
]


def assert_parity(
    name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, slack: float = 2.0, ulps: float = 1.0
) -> None:
    """max|actual - exact| <= slack * max|same_dtype - exact| + `ulps` ulps of max|exact|, in float64.

    `actual` and `same_dtype` have the dtype under test, `exact` is float64. No tolerance is set by hand.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype} != {same_dtype.dtype}"
    assert exact.dtype == torch.float64, f"{name}: truth must be float64, got {exact.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: non-finite values"
    rounding = ulps * torch.finfo(actual.dtype).eps * exact.abs().max().item()
    actual, same_dtype = actual.double(), same_dtype.double()
    error = (actual - exact).abs().max().item()
    budget = slack * (same_dtype - exact).abs().max().item() + rounding
    assert error <= budget, f"{name}: error {error:.3e} exceeds budget {budget:.3e}"
