"""A product with a weight matrix.

    y = x W^T + b,   where there is a b

Shape letters: N rows (all leading dims flattened), I and O features in and out.
Precision: products in the dtype of `x`; few rows on a CPU are summed in float32 and rounded once.
Cost: few rows, as in generation, cost the reading of W. torch's product for a CPU reads it at a third of the
memory's rate or less. So csrc/cpu/linear.h takes these.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from lumi.kernels.native import cpu_operators, runs_directly

# Rows up to which the operator for CPUs beats torch's product, by element size: torch multiplies bfloat16 by
# instructions of its own.
FEW_ROWS = {4: 32, 2: 8}


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y (..., O) from x (..., I), weight (O, I) and bias (O,), which are cast to the dtype of `x`."""
    return F.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """As `linear_reference`. Without gradients, C++ multiplies few rows by a contiguous weight of their
    dtype."""
    plain = runs_directly(x, weight) and weight.dtype == x.dtype and weight.is_contiguous()
    # Asked last: a compiled graph must not depend on the number of rows.
    if plain and 0 < x.numel() <= FEW_ROWS[x.element_size()] * x.shape[-1]:
        y = native_linear(x, weight)
        return y if bias is None else y.add_(bias.to(y.dtype))
    return linear_reference(x, weight, bias)


def native_linear(x: Tensor, weight: Tensor) -> Tensor:
    """y (..., O), contiguous."""
    outputs, inputs = weight.shape
    y = torch.empty(*x.shape[:-1], outputs, dtype=x.dtype)
    wide = x.float().contiguous()
    cpu_operators(x.dtype).linear(
        wide.data_ptr(), weight.data_ptr(), y.data_ptr(), x.numel() // inputs, inputs, outputs,
        torch.get_num_threads(),
    )  # fmt: skip
    return y
