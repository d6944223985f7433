"""The library `safetensors` judges the files."""

import json

import pytest
import safetensors
import safetensors.torch
import torch

from lumi.config import UserError
from lumi.host import tensor_files
from lumi.host.storage import file_record
from lumi.host.tensor_files import SAFETENSORS_TYPES, load_tensors, save_tensors


@pytest.fixture
def tensors():
    """One of every type, of odd sizes, one transposed, one empty, one a scalar."""
    generator = torch.Generator().manual_seed(0)
    values = {
        f"of {name}": torch.randint(0, 2, (3, 5), generator=generator).to(dtype)
        for dtype, name in SAFETENSORS_TYPES.items()
    }
    return values | {
        "é": torch.randn(4, 7, generator=generator).T,
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(1.5, dtype=torch.bfloat16),
    }


@pytest.mark.parametrize("chunk_bytes", [7, 2**28])
def test_the_library_reads_what_is_written(tensors, tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(tensor_files, "_CHUNK_BYTES", chunk_bytes)
    moved = []
    path = tmp_path / "model.safetensors"
    record = save_tensors(path, tensors, {"base": "none"}, moved=lambda: moved.append(1))
    assert record == file_record(path)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert len(moved) >= size / chunk_bytes
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "base": "none"}
    for read in (safetensors.torch.load_file(path), load_tensors(path)):
        assert read.keys() == tensors.keys()
        for name, tensor in tensors.items():
            assert read[name].dtype == tensor.dtype
            assert torch.equal(read[name], tensor)


def test_it_is_written_as_the_library_does(tmp_path):
    """Byte by byte; but the library orders several metadata, and types of one size, as it likes."""
    tensors = {
        "b": torch.arange(6).view(2, 3),
        "a": torch.tensor(3.0),
        "none": torch.zeros(0, 3),
        "é": torch.ones(3, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }
    save_tensors(tmp_path / "x", tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    assert (tmp_path / "x").read_bytes() == safetensors.torch.save(contiguous, {"format": "pt"})


def test_every_tensor_is_aligned(tensors, tmp_path):
    save_tensors(tmp_path / "x", tensors)
    data = (tmp_path / "x").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, tensor in tensors.items():
        assert header[name]["data_offsets"][0] % tensor.element_size() == 0


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "x").write_bytes(b"hello")
    for path in (tmp_path / "x", tmp_path / "nowhere"):
        with pytest.raises(UserError, match=f"{path}: must be a safetensors file: "):
            load_tensors(path)
