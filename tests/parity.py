"""Numerical parity: a kernel may be at most `slack` times worse than the same math in the same dtype, judged
by float64."""

import torch
from torch import Tensor


def assert_parity(name: str, actual: Tensor, same_dtype: Tensor, exact: Tensor, slack: float = 2.0) -> None:
    """max|actual - exact| <= slack * max|same_dtype - exact| + one ulp of max|exact|, compared in float64.

    `actual` and `same_dtype` have the dtype under test, `exact` is float64. No tolerance is set by hand.
    """
    assert actual.shape == exact.shape, f"{name}: shape {tuple(actual.shape)} != {tuple(exact.shape)}"
    assert actual.dtype == same_dtype.dtype, f"{name}: dtype {actual.dtype} != {same_dtype.dtype}"
    assert exact.dtype == torch.float64, f"{name}: truth must be float64, got {exact.dtype}"
    if actual.numel() == 0:
        return
    assert torch.isfinite(actual).all(), f"{name}: non-finite values"
    ulp = torch.finfo(actual.dtype).eps * exact.abs().max().item()
    actual, same_dtype = actual.double(), same_dtype.double()
    error = (actual - exact).abs().max().item()
    budget = slack * (same_dtype - exact).abs().max().item() + ulp
    assert error <= budget, f"{name}: error {error:.3e} exceeds budget {budget:.3e}"
