import hashlib
import json
import os
import pickle
import shutil

import pytest
import safetensors.torch
import torch

from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint, prune_checkpoints, seal_checkpoint
from lumi.checkpoint.saver import Saver
from lumi.config import UserError
from lumi.host.storage import DamagedError, file_record
from lumi.host.tensor_files import load_tensors, save_tensors


def save(folder, step=1, value=1):
    tensors = {
        "model": {"w": torch.full((3, 5), float(value)), "v": torch.arange(3)},
        "optimizer": {"w/step": torch.tensor(2.0)},
    }
    with Saver(folder) as saver:
        saver.begin(step, tensors, {"note": value})
    return folder / f"step-{step:08d}"


def load(path):
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    return checkpoint


def rewrite(path, name, change):
    """Change a JSON file of a checkpoint as somebody would who knows how to make the manifest fit."""
    data = json.loads((path / name).read_text())
    change(data)
    (path / name).write_text(json.dumps(data))
    if name != "manifest.json":
        rewrite(
            path, "manifest.json", lambda manifest: manifest["files"].update({name: file_record(path / name)})
        )


def test_round_trip(tmp_path):
    path = save(tmp_path, 7)
    names = [
        "manifest.json",
        "model-00000.safetensors",
        "optimizer-00000.safetensors",
        "state.json",
        "tensors.json",
    ]
    assert sorted(file.name for file in path.iterdir()) == names
    checkpoint = load(path)
    assert checkpoint.state == {"step": 7, "note": 1}
    assert checkpoint.shapes("model") == {"w": (3, 5), "v": (3,)}
    assert checkpoint.shapes("optimizer") == {"w/step": ()}
    assert torch.equal(checkpoint.read("model", "w"), torch.ones(3, 5))
    targets = {"w": torch.zeros(3, 5, requires_grad=True), "v": torch.zeros(3, dtype=torch.int64)}
    checkpoint.fill("model", targets)
    assert torch.equal(targets["w"], torch.ones(3, 5))
    assert torch.equal(targets["v"], torch.arange(3))
    step = torch.zeros(())
    checkpoint.fill("optimizer", {"w/step": step})
    assert step == 2
    on_demand = checkpoint.tensors("model")
    assert list(on_demand) == ["w", "v"]
    assert torch.equal(on_demand["v"], torch.arange(3))
    with pytest.raises(KeyError):
        on_demand["x"]


def test_other_names_shapes_and_types_are_refused_and_nothing_is_changed(tmp_path):
    checkpoint = load(save(tmp_path))
    w, v = torch.zeros(3, 5), torch.zeros(3, dtype=torch.int64)
    remedy = "resume with the config that wrote it"
    cases = {
        r"model tensor 'x' must be in the checkpoint, got none": {"w": w, "v": v, "x": v},
        r"model tensor 'v' must be in the model, got one of shape \(3,\) only here": {"w": w},
        r"model tensor 'v' must be int64 of shape \(4,\), got int64 of \(3,\)": {
            "w": w,
            "v": torch.zeros(4, dtype=torch.int64),
        },
        r"model tensor 'v' must be int32 of shape \(3,\), got int64 of \(3,\)": {
            "w": w,
            "v": torch.zeros(3, dtype=torch.int32),
        },
    }
    for message, targets in cases.items():
        with pytest.raises(UserError, match=rf"step-00000001: {message}; {remedy}"):
            checkpoint.fill("model", targets)
    with pytest.raises(UserError, match=r"must hold tensors of 'ema', got \['model', 'optimizer'\]"):
        checkpoint.shapes("ema")
    assert not w.any()


def test_one_flipped_bit_anywhere_is_refused_by_name(tmp_path):
    path = save(tmp_path)
    for file in path.iterdir():
        whole = file.read_bytes()
        for index in range(
            len(whole) - (file.name == "manifest.json")
        ):  # its last byte is a line's end, which may be any space
            changed = bytearray(whole)
            changed[index] ^= 1 << index % 8
            file.write_bytes(changed)
            with pytest.raises(UserError, match=r"step-00000001/"):
                load(path)
        file.write_bytes(whole)
    load(path)


def test_processes_share_the_checking(tmp_path):
    path = save(tmp_path)
    for name, part in (("model-00000.safetensors", 0), ("optimizer-00000.safetensors", 1)):
        whole = (path / name).read_bytes()
        (path / name).write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
        open_checkpoint(path).verify(1 - part, 2)
        with pytest.raises(
            UserError, match=rf"step-00000001/{name}: SHA-256 must be .* corrupt; resume from another one"
        ):
            open_checkpoint(path).verify(part, 2)
        (path / name).write_bytes(whole)


def test_truncated_missing_and_unfinished_are_refused(tmp_path):
    path = save(tmp_path)
    file = path / "model-00000.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1)
    with pytest.raises(UserError, match=rf"model-00000\.safetensors: must be {size} bytes, got {size - 1}"):
        open_checkpoint(path)
    file.unlink()
    with pytest.raises(UserError, match=r"model-00000\.safetensors: is missing"):
        open_checkpoint(path)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"must be a checkpoint folder with a manifest\.json"):
        open_checkpoint(path)
    assert list_checkpoints(tmp_path) == []


def test_manifest_and_plan_must_name_the_same_files(tmp_path):
    """Or a file would be read that nobody has checked."""
    path = save(tmp_path)
    rewrite(path, "manifest.json", lambda manifest: manifest["files"].pop("model-00000.safetensors"))
    with pytest.raises(
        UserError, match=r"model-00000\.safetensors: must stand in both manifest\.json and tensors\.json"
    ):
        open_checkpoint(path)


def test_another_format_is_refused(tmp_path):
    path = save(tmp_path)
    rewrite(path, "manifest.json", lambda manifest: manifest.update(format=1))
    with pytest.raises(
        UserError,
        match=r"manifest\.json: format must be 2, got 1; resume with the version of Lumi that wrote it",
    ) as raised:
        open_checkpoint(path)
    assert not isinstance(raised.value, DamagedError)


def test_damaged_is_what_has_the_wrong_content(tmp_path):
    path = save(tmp_path)
    (path / "manifest.json").write_text("{")
    with pytest.raises(DamagedError, match=r"manifest\.json: not valid JSON"):
        open_checkpoint(path)
    path = save(tmp_path)
    (path / "tensors.json").unlink()
    with pytest.raises(DamagedError, match=r"tensors\.json: is missing"):
        open_checkpoint(path)


def test_a_plan_larger_than_its_files_is_refused_before_anything_is_allocated(tmp_path):
    path, large = save(tmp_path), 10**15

    def grow(groups):
        groups["model"]["w"].update(shape=[large])
        groups["model"]["w"]["pieces"][0].update(offset=[0], shape=[large])

    rewrite(path, "tensors.json", grow)
    size = (path / "model-00000.safetensors").stat().st_size
    with pytest.raises(
        DamagedError,
        match=rf"model-00000\.safetensors: must hold {4 * large + 3 * 8} bytes of tensors, got a file of {size}",
    ):
        open_checkpoint(path).read("model", "w")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda w: w["pieces"].pop(),
            r"the pieces must hold the 15 elements of shape \(3, 5\) once each, got 0",
        ),
        (
            lambda w: w["pieces"][0].update(shape=[2, 5]),
            r"must hold the 15 elements of shape \(3, 5\) once each, got 10",
        ),
        (lambda w: w["pieces"][0].update(offset=[1, 0]), r"a piece must lie inside shape \(3, 5\)"),
        (lambda w: w["pieces"].append(w["pieces"][0]), r"once each, got 30"),
        (
            lambda w: w["pieces"][0].update(file="../model-00000.safetensors"),
            r"must be the name of a tensor file beside it, got '\.\./",
        ),
        (
            lambda w: w["pieces"][0].update(file="/etc/passwd"),
            r"must be the name of a tensor file beside it, got '/etc/passwd'",
        ),
        (lambda w: w["pieces"][0].update(file=7), "must tell where a tensor lies"),
        (lambda w: w["pieces"][0].update(offset=[0.0, 0]), r"must be lists of integers, got \[0\.0, 0\]"),
        (lambda w: w["pieces"][0].pop("file"), "must tell where a tensor lies: 'file'"),
        (lambda w: w.update(dtype="load"), "dtype must be a type of torch's, got 'load'"),
        (lambda w: w.update(shape=[5, 3]), r"a piece must lie inside shape \(5, 3\)"),
        (lambda w: w.update(shape=15), "must tell where a tensor lies"),
    ],
)
def test_a_crafted_plan_is_refused(tmp_path, change, message):
    path = save(tmp_path)
    rewrite(path, "tensors.json", lambda groups: change(groups["model"]["w"]))
    with pytest.raises(UserError, match=rf"tensors\.json: model tensor 'w': .*{message}"):
        open_checkpoint(path)


def test_a_plan_that_overlaps_and_leaves_a_hole(tmp_path):
    """The right number of elements, but not each once: neither when it is read, nor when it is written."""
    path = save(tmp_path)
    piece = {"file": "model-00000.safetensors", "shape": [2, 5]}
    other = {"file": "model-00000.safetensors", "shape": [1, 5]}
    pieces = [piece | {"offset": [0, 0]}, other | {"offset": [1, 0]}]
    rewrite(path, "tensors.json", lambda groups: groups["model"]["w"].update(pieces=pieces))
    with pytest.raises(UserError, match=r"tensors\.json: model tensor 'w': .* must not overlap"):
        open_checkpoint(path)
    entry = {"dtype": "float32", "shape": [3, 5], "pieces": pieces}
    with pytest.raises(ValueError, match="must not overlap"):
        seal_checkpoint(tmp_path, {}, {"model": {"w": entry}}, {})
    assert not (tmp_path / "manifest.json").exists()


def test_a_tensor_file_that_is_not_as_the_plan_says(tmp_path):
    path = save(tmp_path)
    file = path / "model-00000.safetensors"
    for tensors, message in (
        (
            {"w": torch.ones(5, 3), "v": torch.arange(3)},
            r"'w' must be float32 of \(3, 5\), got float32 of \(5, 3\)",
        ),
        (
            {"w": torch.ones(3, 5).int(), "v": torch.arange(3)},
            r"'w' must be float32 of \(3, 5\), got int32 of \(3, 5\)",
        ),
        ({"v": torch.arange(3)}, r"must be a safetensors file with 'w': .*"),
    ):
        record = save_tensors(file, tensors)
        rewrite(
            path,
            "manifest.json",
            lambda manifest, record=record: manifest["files"].update({file.name: record}),
        )
        with pytest.raises(UserError, match=rf"model-00000\.safetensors: {message}"):
            load(path).read("model", "w")


class Crafted:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize(
    "name", ["model-00000.safetensors", "state.json", "tensors.json", "manifest.json", ".metadata"]
)
def test_a_crafted_pickle_never_runs(tmp_path, name):
    path, proof = save(tmp_path), tmp_path / "it ran"
    crafted = pickle.dumps(Crafted(proof))
    (path / name).write_bytes(crafted)
    if name == ".metadata":  # what torch's own format would load
        load(path).read("model", "w")
    else:
        if name != "manifest.json":
            rewrite(
                path,
                "manifest.json",
                lambda manifest: manifest["files"].update({name: file_record(path / name)}),
            )
        with pytest.raises(UserError, match=rf"step-00000001/{name}: "):
            load(path).read("model", "w")
    assert not proof.exists()
    pickle.loads(crafted).close()  # it would have
    assert proof.exists()


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


def test_prune_keeps_the_last_and_the_best(tmp_path):
    path = save(tmp_path)
    for step in range(2, 7):
        shutil.copytree(path, tmp_path / f"step-{step:08d}")
    prune_checkpoints(tmp_path, keep_last=2, best=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000003",
        "step-00000005",
        "step-00000006",
    ]


def test_what_could_not_be_pruned_is_told_and_tried_again(tmp_path, monkeypatch):
    path = save(tmp_path)
    for step in range(2, 5):
        shutil.copytree(path, tmp_path / f"step-{step:08d}")
    real = shutil.rmtree

    def busy(folder, *arguments, **keywords):
        if "step-00000001" in str(folder):
            raise OSError(39, "Directory not empty", str(folder))
        real(folder, *arguments, **keywords)

    monkeypatch.setattr(shutil, "rmtree", busy)
    (fault,) = prune_checkpoints(tmp_path, keep_last=2, best=None)
    assert fault.endswith("step-00000001-discarded: cannot be removed: Directory not empty")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000004"]
    monkeypatch.undo()
    assert prune_checkpoints(tmp_path, keep_last=2, best=None) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000003", "step-00000004"]


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path):
    assert list_checkpoints(tmp_path / "none") == []
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        list_checkpoints(tmp_path / "file")
