import dataclasses

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
