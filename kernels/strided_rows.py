"""Kernels see a tensor of any shape and strides as rows."""

from torch import Tensor


def strided_rows(t: Tensor) -> Tensor:
    """(..., D) as (N, D) with unit stride inside a row: a view if one stride can walk the rows, else a
    copy."""
    t_ND = t.reshape(-1, t.shape[-1])
    return t_ND if t_ND.stride(1) == 1 or t_ND.shape[1] == 1 else t_ND.contiguous()
