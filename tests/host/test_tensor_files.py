import hashlib

import pytest
import safetensors.torch
import torch

from lumi.config import UserError
from lumi.host.tensor_files import load_tensors, save_tensors


def test_not_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(UserError, match=r"x\.safetensors: must be a safetensors file"):
        load_tensors(tmp_path / "x.safetensors")


def test_tensors_are_written_as_the_library_does(tmp_path):
    """Byte by byte."""
    tensors = {
        "b": torch.arange(6).view(2, 3),
        "a": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
        "é": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    record = save_tensors(tmp_path / "ours", tensors, {"base": "x"})
    data = (tmp_path / "ours").read_bytes()
    assert record == {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    read = safetensors.torch.load(data)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name], tensor)
    save_tensors(tmp_path / "ours", tensors)  # (the library's order of several metadata is not defined)
    assert (tmp_path / "ours").read_bytes() == safetensors.torch.save(contiguous, {"format": "pt"})
