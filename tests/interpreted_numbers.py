"""Triton's interpreter with bfloat16 as GPUs have it, and with their approximate instructions.

The interpreter keeps bfloat16 as uint16: its arithmetic is one of integers, and it casts to bfloat16 by
cutting bits off. `ml_dtypes.bfloat16` makes a type of numpy's of it: every operation is computed in float32
and rounded to the nearest, ties to even. A product of matrices widens its factors, which is exact, and sums
in float32, as tensor cores do.
"""

from collections.abc import Callable
from functools import partial

import ml_dtypes
import numpy as np
import pytest
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
LOG2_E = np.float32(1.4426950408889634)
SMALL = 1e-37  # below it a step is no longer a small part of a number


def install_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until `monkeypatch` is undone, bfloat16 is a floating-point type of the interpreter."""
    numpy_type, from_bits = interpreter._get_np_dtype, InterpreterBuilder.create_fp_to_fp

    def with_bfloat16(dtype):
        return BFLOAT16 if dtype.scalar == tl.bfloat16 else numpy_type(dtype)

    def cast(self, handle, dtype):
        return TensorHandle(handle.data.astype(with_bfloat16(dtype)), dtype.scalar)

    def rounded_cast(self, handle, dtype, rounding):
        types = {handle.dtype.scalar, dtype.scalar}
        if types <= {tl.bfloat16, tl.float16, tl.float32} and rounding != interpreter._ir.ROUNDING_MODE.RTZ:
            return cast(self, handle, dtype)
        return from_bits(self, handle, dtype, rounding)

    def constant(self, value):
        return TensorHandle(np.array([value], BFLOAT16), tl.bfloat16)

    monkeypatch.setattr(interpreter, "_get_np_dtype", with_bfloat16)
    monkeypatch.setattr(InterpreterBuilder, "get_bf16", constant, raising=False)
    monkeypatch.setattr(InterpreterBuilder, "cast_impl", cast)
    monkeypatch.setattr(InterpreterBuilder, "create_fp_to_fp", rounded_cast)


def install_approximations(monkeypatch: pytest.MonkeyPatch, seed: int, ulps: int = 2) -> None:
    """Until `monkeypatch` is undone, float32 powers, logarithms, quotients and roots are some `ulps` off.

    That is what GPUs promise of the instructions that Triton emits: ex2.approx, div.full, sqrt.approx and
    rsqrt.approx. exp(x) is 2^(x log2 e), its argument rounded, and 2^0 is 1 exactly. Logarithms are computed
    with fused multiplications there and are better than this.
    """

    def approximate(function: Callable, *arguments: np.ndarray) -> np.ndarray:
        if arguments[0].dtype != np.float32:
            return function(*arguments)
        with np.errstate(all="ignore"):
            values = function(*(argument.astype(np.float64) for argument in arguments)).astype(np.float32)
        steps = (_hash(seed, *arguments) % (2 * ulps + 1) - ulps).astype(np.int32)
        near = (values.view(np.int32) + steps).view(np.float32)
        return np.where(np.isfinite(near) & np.isfinite(values) & (np.abs(values) > SMALL), near, values)

    def exp2(x: np.ndarray) -> np.ndarray:
        return np.where(x == 0, x.dtype.type(1), approximate(np.exp2, x))

    def unary(function: Callable) -> Callable:
        return lambda self, x: TensorHandle(function(x.data), x.dtype.scalar)

    def divide(self, x, y):
        return TensorHandle(approximate(np.divide, x.data, y.data), x.dtype.scalar)

    for name, function in {
        "exp2": exp2,
        "exp": lambda x: exp2(x * LOG2_E),
        "log": partial(approximate, np.log),
        "log2": partial(approximate, np.log2),
        "sqrt": partial(approximate, np.sqrt),
        "rsqrt": partial(approximate, lambda x: 1 / np.sqrt(x)),
    }.items():
        monkeypatch.setattr(InterpreterBuilder, f"create_{name}", unary(function))
    monkeypatch.setattr(InterpreterBuilder, "create_fdiv", divide)


def _hash(seed: int, *arguments: np.ndarray) -> np.ndarray:
    """Some number for each tuple of float32 arguments: an instruction gives the same for the same."""
    mixed = np.int64(seed)
    for argument in arguments:
        mixed = (
            (mixed * 1_000_003 + argument.astype(np.float32).view(np.uint32)) % 2**31 * 2_654_435_761 % 2**32
        )
    return mixed >> 8
