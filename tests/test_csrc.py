"""The C++ extension itself: what its bindings take and refuse. Numbers are tested in tests/kernels/test_global_norm.py."""

import ctypes
import math

import pytest

from lumi import _csrc


def test_global_norm_of_plain_memory():
    memory = (ctypes.c_float * 2)(3.0, 4.0)
    assert _csrc.global_norm([ctypes.addressof(memory)], [2], 1) == 5.0


def test_global_norm_of_nothing():
    assert _csrc.global_norm([], [], 1) == 0.0
    assert _csrc.global_norm([0], [0], 1) == 0.0


def test_global_norm_refuses():
    with pytest.raises(ValueError, match="pointers and sizes must have the same length"):
        _csrc.global_norm([], [1], 1)
    with pytest.raises(ValueError, match="max_threads must be at least 1"):
        _csrc.global_norm([], [], 0)
    with pytest.raises(ValueError, match="a null pointer must have size 0"):
        _csrc.global_norm([0], [1], 1)
    with pytest.raises(TypeError):
        _csrc.global_norm([-1], [1], 1)


def test_many_small_arrays():
    memory = (ctypes.c_float * 10_000)(*[1.0] * 10_000)
    address = ctypes.addressof(memory)
    norm = _csrc.global_norm([address + 4 * i for i in range(10_000)], [1] * 10_000, 4)
    assert norm == math.sqrt(10_000)
