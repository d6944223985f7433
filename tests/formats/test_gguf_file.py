"""GGUF files as anybody may have made them: read or refused in one line."""

import random
import struct
import sys

import gguf
import numpy as np
import pytest
import torch
from gguf_files import build

from lumi.config import UserError
from lumi.formats.gguf_export import GgufFolder
from lumi.formats.gguf_file import bytes_of, encode, is_gguf, open_gguf, rounded, write_gguf
from lumi.formats.pretrained import Pretrained, load_pretrained
from lumi.host.storage import DamagedError

METADATA = {
    "a.text": "é\n",
    "a.count": 7,
    "a.share": 0.1,
    "a.flag": True,
    "a.names": ["x", ""],
    "a.ids": [1, -2],
}
KINDS = ("F32", "F16", "BF16", "Q8_0", "Q4_0")


@pytest.fixture(scope="module")
def model_file(tokenizer, tmp_path_factory):
    """The bytes of a whole model."""
    folder = tmp_path_factory.mktemp("gguf")
    pretrained = Pretrained(build(tokenizer, num_layers=1, model_dim=32, mlp_dim=32), tokenizer, folder)
    GgufFolder("q8_0").save(folder, "a", pretrained, [])
    return (folder / "model-q8_0.gguf").read_bytes()


def opened(path, data):
    path.write_bytes(data)
    return open_gguf(path)


def header(*parts, tensors=0, entries=1):
    return struct.pack("<IIQQ", 0x46554747, 3, tensors, entries) + b"".join(parts)


def entry(key, kind, *values):
    return struct.pack("<Q", len(key)) + key.encode() + struct.pack("<I", kind) + b"".join(values)


# What is written comes back.


def test_metadata_and_tensors(tmp_path):
    tensor = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    plan = {f"{kind}.weight": (tuple(tensor.shape), kind) for kind in KINDS}
    write_gguf(tmp_path / "a.gguf", "llama", METADATA, plan, lambda name: tensor)
    file = open_gguf(tmp_path / "a.gguf")
    assert {key: file.metadata[key] for key in METADATA if key != "a.share"} == {
        key: value for key, value in METADATA.items() if key != "a.share"
    }
    assert file.value("a.share", float) == np.float32(0.1)
    assert file.value("general.architecture", str) == "llama"
    assert file.value("a.nothing", int, 3) == 3
    for kind in KINDS:
        name = f"{kind}.weight"
        assert file.shape(name) == (5, 64)
        assert torch.equal(file.tensor(name), rounded(tensor, kind))
        assert bytes_of((5, 64), kind) == encode(tensor, kind).nbytes == file.tensors[name].n_bytes
        raw = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType[kind])
        assert np.array_equal(file.tensors[name].data.view(np.uint8), raw.view(np.uint8))
    assert torch.equal(rounded(tensor, "F16"), tensor.half().float())
    assert torch.equal(rounded(tensor, "BF16"), tensor.bfloat16().float())


def test_types_of_metadata(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", METADATA, {}, lambda name: None)
    file = open_gguf(tmp_path / "a.gguf")
    for ask, message in (
        (lambda: file.value("a.count", str), "a.count must be of the type str, got 7"),
        (lambda: file.value("a.flag", int), "a.flag must be of the type int, got True"),
        (lambda: file.value("b", int), "b is missing in the metadata"),
        (lambda: file.list("a.names", int), r"a.names must be an array of the type int, got \['x', ''\]"),
        (lambda: file.list("b", int), "b must be an array of the type int, got None"),
    ):
        with pytest.raises(UserError, match=message):
            ask()


def test_names_of_files(tmp_path):
    (tmp_path / "folder.gguf").mkdir()
    assert is_gguf("a/b.gguf")
    assert is_gguf("b.GGUF")
    assert not is_gguf(tmp_path / "folder.gguf")
    assert not is_gguf("a/gguf")


# What is no whole file.


NONE_AT_ALL = {
    "empty": b"",
    "text": b"a model, honestly" * 9,
    "version 9": struct.pack("<IIQQ", 0x46554747, 9, 0, 0),
    "a count of entries": header(entries=2**63),
    "a count of tensors": header(entries=0, tensors=2**63),
    "an endless array": header(entry("a", 9, struct.pack("<IQ", 0, 2**60))),
    "an endless text": header(entry("a", 8, struct.pack("<Q", 2**60), b"abc")),
    "arrays in arrays": header(entry("a", 9, struct.pack("<IQ", 9, 1) * 5000)),
    "a type of 99": header(entry("a", 99, b"1234")),
    "a key twice": header(entry("a", 7, b"\1"), entry("a", 7, b"\1"), entries=2),
    "no UTF-8": header(entry("a", 8, struct.pack("<Q", 1), b"\xff")),
    "a tensor of 2**60 numbers": header(
        struct.pack("<Q", 1), b"a", struct.pack("<IQQIQ", 2, 2**30, 2**30, 0, 0), entries=0, tensors=1
    ),
    "a tensor of a type of 99": header(
        struct.pack("<Q", 1), b"a", struct.pack("<IQIQ", 1, 1, 99, 0), entries=0, tensors=1
    ),
}


@pytest.mark.parametrize("data", NONE_AT_ALL.values(), ids=NONE_AT_ALL)
def test_no_gguf_file(data, tmp_path):
    with pytest.raises(
        UserError, match=r"a\.gguf: must be a whole GGUF file of version 2 or 3, got .+; download"
    ):
        opened(tmp_path / "a.gguf", data)


@pytest.mark.parametrize(
    ("data", "got"),
    [
        (b"", "a file that ends too early"),
        (b"GG", "a file that ends too early"),
        (b"x", "a file of another kind"),
        (NONE_AT_ALL["text"], "a file of another kind"),
        (NONE_AT_ALL["version 9"], "a file of version 9"),
        (NONE_AT_ALL["a type of 99"], "a damaged file"),
        (NONE_AT_ALL["an endless text"], "a file that ends too early"),
    ],
)
def test_what_is_at_fault_is_said_in_our_words(data, got, tmp_path):
    with pytest.raises(DamagedError, match=rf"version 2 or 3, got {got}; download or copy it again$"):
        opened(tmp_path / "a.gguf", data)


def test_a_vocabulary_of_millions(tmp_path, monkeypatch):
    monkeypatch.setattr("lumi.formats.gguf_file._ENTRIES", 1000)
    array = entry("a", 9, struct.pack("<IQ", 0, 2000), b"a" * 2000)
    with pytest.raises(UserError, match="got more than 1000 entries"):
        opened(tmp_path / "a.gguf", header(array))


def test_no_file_and_no_permission(tmp_path):
    with pytest.raises(UserError, match=r"a\.gguf: cannot be read: No such file or directory"):
        open_gguf(tmp_path / "a.gguf")


def test_truncated_files(model_file, tmp_path):
    last = len(model_file) - 33  # the rest may be padding
    for length in {*range(0, last, last // 29), 4, 8, 23, 24, last}:
        with pytest.raises(UserError, match="must be a whole GGUF file"):
            opened(tmp_path / "a.gguf", model_file[:length])


@pytest.mark.parametrize("count", [150, pytest.param(3000, marks=pytest.mark.soak)])
def test_changed_files(model_file, tmp_path, count):
    """Each is a model, or refused in one line."""
    rng, path, messages = random.Random(count), tmp_path / "changed.gguf", []
    for _ in range(count):
        data = bytearray(model_file)
        for _ in range(rng.randint(1, 4)):
            data[int(len(data) * rng.random() ** 3)] = rng.choice((0, 1, 127, 255, rng.randrange(256)))
        path.write_bytes(data)
        try:
            load_pretrained(path, device="cpu", kernels="reference")
        except UserError as error:
            messages.append(str(error))
    assert count // 10 < len(messages) < count
    assert not any("\n" in message for message in messages)


def test_the_other_byte_order(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama", endianess=gguf.GGUFEndian.BIG)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="must be of this machine's byte order, got the other one"):
        open_gguf(tmp_path / "a.gguf")


def test_one_part_of_several(tmp_path):
    write_gguf(tmp_path / "a.gguf", "llama", {"split.count": 3}, {}, lambda name: None)
    with pytest.raises(UserError, match="must hold the whole model, got one part of several; join the parts"):
        open_gguf(tmp_path / "a.gguf")


def test_types_that_cannot_be_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_tensor("a", np.arange(4, dtype=np.int32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UserError, match="a must be of a type that the package gguf can read, got I32"):
        open_gguf(tmp_path / "a.gguf").tensor("a")


def test_without_the_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(
        UserError, match=r"GGUF files need the package gguf.*; install it: pip install 'lumi-train"
    ):
        open_gguf(tmp_path / "a.gguf")
