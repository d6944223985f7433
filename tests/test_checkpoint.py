import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from lumi.checkpoint import Checkpoint, list_checkpoints, load_checkpoint, load_tensors, prune_checkpoints, save_checkpoint
from lumi.config import UserError


def make(value):
    return Checkpoint({"model": {"w": torch.full((3, 5), float(value))}, "optimizer": {"w/step": torch.tensor(2.0)}}, {"note": value})


def test_round_trip(tmp_path):
    path = save_checkpoint(tmp_path, 7, make(1))
    assert path.name == "step-00000007"
    assert sorted(file.name for file in path.iterdir()) == ["manifest.json", "model.safetensors", "optimizer.safetensors", "state.json"]
    loaded = load_checkpoint(path)
    assert loaded.state == {"step": 7, "note": 1}
    assert torch.equal(loaded.tensors["model"]["w"], torch.ones(3, 5))
    assert torch.equal(loaded.tensors["optimizer"]["w/step"], torch.tensor(2.0))
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in path.iterdir()} == {0o666 & ~umask}


def test_saving_a_step_again_replaces_it(tmp_path):
    save_checkpoint(tmp_path, 7, make(1))
    path = save_checkpoint(tmp_path, 7, make(2))
    assert load_checkpoint(path).state["note"] == 2
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000007"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_one_flipped_byte_is_refused_by_name(tmp_path, name):
    file = save_checkpoint(tmp_path, 1, make(1)) / name
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)
    with pytest.raises(UserError, match=rf"step-00000001/{name}: SHA-256 must be .* corrupt; delete this checkpoint"):
        load_checkpoint(file.parent)


def test_one_flipped_bit_anywhere_in_the_manifest_is_refused(tmp_path):
    file = save_checkpoint(tmp_path, 1, make(1)) / "manifest.json"
    data = file.read_bytes()
    for index in range(len(data) - 1):  # the last byte is a line's end, which may be any space
        changed = bytearray(data)
        changed[index] ^= 1 << index % 8
        file.write_bytes(changed)
        with pytest.raises(UserError, match=r"step-00000001/"):
            load_checkpoint(file.parent)


def test_truncated_missing_and_unfinished_are_refused(tmp_path):
    path = save_checkpoint(tmp_path, 1, make(1))
    size = (path / "model.safetensors").stat().st_size
    os.truncate(path / "model.safetensors", size - 1)
    with pytest.raises(UserError, match=rf"model\.safetensors: must be {size} bytes, got {size - 1}"):
        load_checkpoint(path)
    (path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"model\.safetensors: is missing"):
        load_checkpoint(path)
    (path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"must be a checkpoint folder with a manifest\.json"):
        load_checkpoint(path)
    assert list_checkpoints(tmp_path) == []


def test_not_safetensors(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(b"\x80\x04K\x01.")  # a pickle
    with pytest.raises(UserError, match=r"x\.safetensors: must be a safetensors file"):
        load_tensors(tmp_path / "x.safetensors")


def test_prune_keeps_the_last_and_the_best(tmp_path):
    for step in range(1, 7):
        save_checkpoint(tmp_path, step, make(step))
    prune_checkpoints(tmp_path, keep_last=2, best=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000003", "step-00000005", "step-00000006"]


def test_a_full_disk_leaves_the_earlier_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, 1, make(1))

    def full(*arguments, **keywords):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(UserError, match=r"step-00000002: cannot be written: No space left on device; earlier checkpoints are intact"):
        save_checkpoint(tmp_path, 2, make(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert load_checkpoint(tmp_path / "step-00000001").state["note"] == 1


SAVER = """
import sys, torch
from lumi.checkpoint import Checkpoint, save_checkpoint
step = 1
while True:
    tensors = {name: {"w": torch.full((200_000,), float(step))} for name in ("model", "optimizer")}
    save_checkpoint(sys.argv[1], step % 3, Checkpoint(tensors, {"note": step}))
    print(step, flush=True)
    step += 1
"""


def test_kill_in_the_middle_of_a_save(tmp_path):
    """At eight moments: whatever stands there as a checkpoint loads, and the last one that was reported is there."""
    for attempt in range(8):
        folder = tmp_path / str(attempt)
        process = subprocess.Popen([sys.executable, "-c", SAVER, str(folder)], stdout=subprocess.PIPE, text=True)
        reported = int(process.stdout.readline())
        time.sleep(0.004 * attempt)
        process.send_signal(signal.SIGKILL)
        rest = process.communicate()[0].split()
        reported = max([reported, *map(int, rest)])
        found = [load_checkpoint(path) for path in list_checkpoints(folder)]
        assert max(checkpoint.state["note"] for checkpoint in found) >= reported
        for checkpoint in found:
            for tensors in checkpoint.tensors.values():
                assert (tensors["w"] == checkpoint.state["note"]).all()
