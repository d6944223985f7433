import dataclasses
import subprocess
import sys

import pytest
import torch

from lumi.kernels.bundle import REFERENCE, TRITON, Ops, select


def test_auto_follows_the_device(monkeypatch):
    assert select("auto", "cpu", 64) is REFERENCE
    assert select("auto", "mps", 64) is REFERENCE
    for capability, expected in (((7, 5), REFERENCE), ((8, 0), TRITON), ((12, 0), TRITON)):
        monkeypatch.setattr(
            "lumi.kernels.bundle.capability", lambda device, capability=capability: capability
        )
        assert select("auto", torch.device("cuda", 0), 64) is expected
        assert select("auto", "cuda", 128) is expected
        assert select("auto", "cuda", 256) is REFERENCE
        assert select("auto", "cuda", 36) is REFERENCE


def test_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("reference", "cuda", 64) is REFERENCE
    assert select("triton", "cpu", 64) is TRITON
    assert select("triton", "cuda", 64) is TRITON
    for head_dim in (36, 256):
        assert select("reference", "cuda", head_dim) is REFERENCE
        with pytest.raises(
            ValueError,
            match=f"head_dim must be a multiple of 8 up to 128 for kernels 'triton', got {head_dim}",
        ):
            select("triton", "cuda", head_dim)


def test_triton_needs_cuda_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select("triton", "cuda", 64) is TRITON
    with pytest.raises(ValueError, match=r"kernels must be 'reference' or 'auto' on cpu .*, got 'triton'"):
        select("triton", "cpu", 64)


def test_rejects_another_name():
    with pytest.raises(ValueError, match="kernels must be 'auto', 'reference' or 'triton', got 'fast'"):
        select("fast", "cpu", 64)


def test_bundles_are_frozen_and_differ_where_kernels_exist():
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.rms_norm = None
    for field in dataclasses.fields(Ops):
        reference, kernel = getattr(REFERENCE, field.name), getattr(TRITON, field.name)
        if field.name == "name":
            assert (reference, kernel) == ("reference", "triton")
        else:
            names = {"linear_cross_entropy": "chunked_cross_entropy"}
            assert reference.__name__ == names.get(field.name, f"{field.name}_reference")
            assert kernel.__name__ == field.name


WITHOUT_TRITON = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Missing())
import torch
from lumi.kernels.bundle import REFERENCE, select
from lumi.kernels.rms_norm import rms_norm
assert select("auto", "cpu", 64) is REFERENCE
REFERENCE.rms_norm(torch.ones(2, 4), torch.ones(4))
for attempt in (lambda: select("triton", "cpu", 64), lambda: rms_norm(torch.ones(2, 4), torch.ones(4))):
    try:
        attempt()
    except ValueError as error:
        print(error)
"""


def test_without_triton_the_references_work_and_kernels_say_so():
    result = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    first, second = result.stdout.splitlines()
    assert first == "kernels must be 'reference' where Triton is not installed, got 'triton' on cpu"
    assert (
        second
        == "kernels must be 'reference' on a machine without Triton, got a launch of _rms_norm_fwd_kernel"
    )
