import dataclasses

import pytest
import torch

from lumi import _csrc
from lumi.kernels import native
from lumi.kernels.bundle import NATIVE, REFERENCE, TRITON, Ops, select

BF16 = torch.bfloat16


def test_auto_follows_the_device(monkeypatch):
    assert select("auto", "mps", 64, BF16) is REFERENCE
    for capability, expected in (((7, 5), REFERENCE), ((8, 0), TRITON), ((12, 0), TRITON)):
        monkeypatch.setattr(
            "lumi.kernels.bundle.capability", lambda device, capability=capability: capability
        )
        assert select("auto", torch.device("cuda", 0), 64, BF16) is expected
        assert select("auto", "cuda", 128, BF16) is expected
        assert select("auto", "cuda", 256, BF16) is REFERENCE
        assert select("auto", "cuda", 36, BF16) is REFERENCE


@pytest.mark.skipif(not _csrc.cpu_targets, reason="Lumi was built without csrc/cpu")
def test_a_cpu_has_operators_of_its_own_for_two_dtypes(monkeypatch):
    for dtype in (torch.float32, BF16):
        assert select("auto", "cpu", 36, dtype) is NATIVE
        assert select("native", "cpu", 256, dtype) is NATIVE
    assert select("auto", "cpu", 64, torch.float16) is REFERENCE
    assert select("reference", "cpu", 64, BF16) is REFERENCE
    expected = "kernels must not be 'native' for float16 on cpu: these operators are C"
    with pytest.raises(ValueError, match=expected):
        select("native", "cpu", 64, torch.float16)
    with pytest.raises(ValueError, match="kernels must not be 'native' for bfloat16 on cuda"):
        select("native", "cuda", 64, BF16)
    monkeypatch.setattr(native, "_operators", {})  # as on Windows
    assert select("auto", "cpu", 64, BF16) is REFERENCE
    with pytest.raises(ValueError, match="kernels must not be 'native' for bfloat16 on cpu"):
        select("native", "cpu", 64, BF16)


def test_by_name(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert select("reference", "cuda", 64, BF16) is REFERENCE
    assert select("triton", "cpu", 64, BF16) is TRITON
    assert select("triton", "cuda", 64, BF16) is TRITON
    for head_dim in (36, 256):
        assert select("reference", "cuda", head_dim, BF16) is REFERENCE
        with pytest.raises(
            ValueError,
            match=f"head_dim must be a multiple of 8 up to 128 for kernels 'triton', got {head_dim}",
        ):
            select("triton", "cuda", head_dim, BF16)


def test_triton_needs_cuda_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert select("triton", "cuda", 64, BF16) is TRITON
    with pytest.raises(
        ValueError, match=r"kernels must be 'auto', 'native' or 'reference' on cpu .*, got 'triton'"
    ):
        select("triton", "cpu", 64, BF16)


def test_rejects_another_name():
    with pytest.raises(
        ValueError, match="kernels must be 'auto', 'reference', 'native' or 'triton', got 'fast'"
    ):
        select("fast", "cpu", 64, BF16)


def test_bundles_are_frozen_and_differ_where_kernels_exist():
    with pytest.raises(dataclasses.FrozenInstanceError):
        REFERENCE.rms_norm = None
    for field in dataclasses.fields(Ops):
        reference, kernel, native = (getattr(ops, field.name) for ops in (REFERENCE, TRITON, NATIVE))
        if field.name == "name":
            assert (reference, kernel, native) == ("reference", "triton", "native")
        else:
            names = {
                "linear_cross_entropy": "chunked_cross_entropy",
                "token_losses": "token_losses_chunked",
            }
            assert reference.__name__ == names.get(field.name, f"{field.name}_reference")
            assert kernel.__name__ == ("linear_reference" if field.name == "linear" else field.name)
            shared = field.name in ("attention_plan", "lora_linear")
            assert native.__name__ == (field.name if shared else f"{field.name}_native")
