"""tanh for Triton kernels: not all of Triton's targets have one, and the interpreter has none."""

from lumi.kernels.optional_triton import tl, triton


@triton.jit
def tanh(z):
    """Off by 2e-7, relatively. Near 0, where 1 - exp(-2 |z|) cancels, Lambert's continued fraction."""
    square = z * z
    t = tl.exp(-2.0 * tl.abs(z))
    small = square < 0.25
    numerator = tl.where(small, z * (945.0 + square * (105.0 + square)), tl.where(z < 0, t - 1.0, 1.0 - t))
    return numerator / tl.where(small, 945.0 + square * (420.0 + square * 15.0), 1.0 + t)
