"""Which tensors compiled code takes."""

import pytest
import torch

from lumi.kernels import native
from lumi.kernels.native import has_native, native_device

CPU = torch.device("cpu")


def test_what_was_compiled_decides(monkeypatch):
    assert has_native(CPU)
    assert not has_native(torch.device("mps"))
    monkeypatch.setattr(native.csrc, "has_cuda", False)
    assert not has_native(torch.device("cuda", 0))
    monkeypatch.setattr(native, "csrc", None)  # as LUMI_PURE=1 installs it
    assert not has_native(CPU)
    assert native_device([torch.zeros(3)]) is None


@pytest.mark.parametrize(("capability", "expected"), [((7, 5), False), ((8, 0), True), ((10, 0), True)])
def test_a_gpu_must_be_new_enough(capability, expected, monkeypatch):
    monkeypatch.setattr(native.csrc, "has_cuda", True)
    monkeypatch.setattr(native, "_capability", lambda index: capability)
    assert has_native(torch.device("cuda", 0)) == expected


class Wrapped(torch.Tensor):
    """As DTensor: its elements may lie elsewhere."""


def test_plain_contiguous_tensors_of_one_type_on_one_device():
    plain = [torch.zeros(3, 4), torch.nn.Parameter(torch.zeros(5))]
    assert native_device(plain) == CPU
    assert native_device([torch.zeros(2, dtype=torch.float64)], torch.float64) == CPU
    assert native_device([]) is None
    for other in (
        torch.zeros(3, dtype=torch.float64),
        torch.zeros(3, 4).T,
        torch.zeros(3, device="meta"),
        torch.zeros(3).as_subclass(Wrapped),
    ):
        assert native_device([*plain, other]) is None
