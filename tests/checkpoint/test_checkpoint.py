import os
import pickle
import shutil

import pytest
import torch
from small_checkpoints import load, rewrite, save

from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint, prune_checkpoints
from lumi.config import UserError
from lumi.host.storage import file_record
from lumi.host.tensor_files import save_tensors


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


@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.soak)])
def test_one_flipped_bit_anywhere_is_refused_by_name(every, tmp_path):
    path = save(tmp_path)
    for file in path.iterdir():
        whole = file.read_bytes()
        # The last byte of the manifest ends its line: any white space does.
        end = len(whole) - 1 if file.name == "manifest.json" else len(whole)
        for index in range(0, end, every):
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
        message = rf"step-00000001/{name}: SHA-256 must be .* corrupt; resume from another one"
        with pytest.raises(UserError, match=message):
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
        record = {file.name: save_tensors(file, tensors)}
        rewrite(path, "manifest.json", lambda manifest, record=record: manifest["files"].update(record))
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
            record = {name: file_record(path / name)}
            rewrite(path, "manifest.json", lambda manifest: manifest["files"].update(record))
        with pytest.raises(UserError, match=rf"step-00000001/{name}: "):
            load(path).read("model", "w")
    assert not proof.exists()
    pickle.loads(crafted).close()  # it would have
    assert proof.exists()


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
