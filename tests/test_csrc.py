"""The C++ extension itself: what its bindings take and refuse. Numbers are tested in tests/kernels/."""

import ctypes
import math
import os
import subprocess
import sys

import pytest
import torch

from lumi import _csrc

COUNT = ctypes.c_float()


def arguments(**changes):
    """AdamW arguments for one tensor without elements."""
    lists = {name: [0] for name in ("params", "grads", "exp_avgs", "exp_avg_sqs", "sizes")}
    lists["steps"] = [ctypes.addressof(COUNT)]
    numbers = {
        "lr": 0.1,
        "beta1": 0.9,
        "beta2": 0.95,
        "eps": 1e-8,
        "norm": 0,
        "max_norm": 1.0,
        "loss_scale": 1.0,
    }
    return _csrc.AdamWArguments(**{**lists, **numbers, "copies": [], "weight_decays": [0.0], **changes})


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


def test_adamw_of_plain_memory():
    """The first step moves by lr against the gradient's sign, whatever its size."""
    param, grad, exp_avg, exp_avg_sq = (
        (ctypes.c_float * 2)(*values) for values in ((1.0, 2.0), (1e-3, -1e3), (0, 0), (0, 0))
    )
    copy = (ctypes.c_uint16 * 2)()
    lists = {"params": param, "grads": grad, "exp_avgs": exp_avg, "exp_avg_sqs": exp_avg_sq, "copies": copy}
    lists["steps"] = count = ctypes.c_float(0)
    addresses = {name: [ctypes.addressof(memory)] for name, memory in lists.items()}
    _csrc.adamw(arguments(**addresses, sizes=[2], lr=0.5), 1)
    assert list(param) == pytest.approx([0.5, 2.5], rel=1e-4)
    assert count.value == 1
    assert list(exp_avg) == pytest.approx([1e-4, -1e2])
    assert list(copy) == [0x3F00, 0x4020]
    assert list(grad) == pytest.approx([1e-3, -1e3])


def test_adamw_of_nothing():
    _csrc.adamw(arguments(), 1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"grads": []}, "all lists must have the same length"),
        ({"sizes": [0, 0]}, "all lists must have the same length"),
        ({"weight_decays": []}, "all lists must have the same length"),
        ({"copies": [0, 0]}, "copies must be empty or one for each tensor"),
        ({"steps": []}, "all lists must have the same length"),
        ({"steps": [0]}, "a null pointer must have size 0"),
        ({"sizes": [1]}, "a null pointer must have size 0"),
    ],
    ids=str,
)
def test_adamw_refuses(changes, message):
    with pytest.raises(ValueError, match=message):
        arguments(**changes)


def test_adamw_refuses_no_threads():
    with pytest.raises(ValueError, match="max_threads must be at least 1"):
        _csrc.adamw(arguments(), 0)


def test_imports_without_a_gpu_and_says_what_it_was_built_with():
    names = ("adamw_cuda", "global_norm_cuda")
    asked = f"*(hasattr(_csrc, name) for name in {names})"
    code = f"import torch; from lumi import _csrc; print(_csrc.has_cuda, {asked})"
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True
    )
    assert result.stdout.split() == [str(_csrc.has_cuda)] * 3


@pytest.mark.skipif(
    torch.cuda.is_available() or not _csrc.has_cuda, reason="needs CUDA code and no CUDA device"
)
def test_what_the_cuda_runtime_refuses_is_an_error():
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        _csrc.adamw_cuda(arguments(), 16, 0, 0)
    with pytest.raises(RuntimeError, match=r"^CUDA: "):
        _csrc.global_norm_cuda([], [], 16, 0, 0, 0)
    with pytest.raises(ValueError, match="a null pointer must have size 0"):
        _csrc.adamw_cuda(arguments(), 0, 0, 0)
