"""Triton, or a stand-in that raises when a kernel is launched (macOS, Windows).

Every kernel file holds its reference beside its Triton kernels, and the references must import anywhere.
Without Triton, `@triton.jit` yields an object that raises at launch. Nothing falls back to something slower
unasked.
"""

from typing import Any

try:
    import triton
    import triton.language as tl

    HAS_TRITON = True
except ModuleNotFoundError as error:
    if error.name != "triton":  # a broken installation is an error, a missing one is not
        raise
    HAS_TRITON = False

    class _MissingKernel:
        def __init__(self, function: Any):
            self.name = function.__name__

        def __getitem__(self, grid: Any) -> Any:
            raise ValueError(
                f"kernels must be 'reference' on a machine without Triton, got a launch of {self.name}"
            )

    class _MissingTriton:
        @staticmethod
        def jit(function: Any = None, **options: Any) -> Any:
            return _MissingKernel if function is None else _MissingKernel(function)

        @staticmethod
        def cdiv(a: int, b: int) -> int:
            return -(-a // b)

        @staticmethod
        def next_power_of_2(n: int) -> int:
            return 1 << max(n - 1, 0).bit_length()

    class _MissingLanguage:
        constexpr = Any

    triton, tl = _MissingTriton(), _MissingLanguage()

__all__ = ["HAS_TRITON", "tl", "triton"]
