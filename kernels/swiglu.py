"""SwiGLU, the gated activation between the two halves of the MLP.

    y = silu(gate) * up,   silu(z) = z / (1 + exp(-z))

Shazeer 2020, https://arxiv.org/abs/2002.05202.

Precision: float32 inside (float64 stays float64), cast once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """y (..., F) from gate and up (..., F) of one dtype, which y keeps."""
    wide = torch.promote_types(gate.dtype, torch.float32)
    return (F.silu(gate.to(wide)) * up.to(wide)).to(gate.dtype)
