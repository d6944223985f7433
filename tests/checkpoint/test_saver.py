"""Saving behind the loop's back, in real processes (`saver_processes.py`) and on disks that really fail."""

import os
import threading

import pytest
import torch
from case_server import run_case
from saver_processes import LAYOUTS, whole

from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint, prune_checkpoints
from lumi.checkpoint.saver import Saver
from lumi.config import UserError

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")


def assert_equals_the_truth(path):
    checkpoint = open_checkpoint(path)
    checkpoint.verify()
    for group, tensors in whole().items():
        assert checkpoint.shapes(group) == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        for name, tensor in tensors.items():
            got = checkpoint.read(group, name)
            assert got.dtype == tensor.dtype
            assert torch.equal(got, tensor), (path, name)
    return checkpoint


@forks
def test_saved_under_any_layout_and_read_under_any_other(tmp_path):
    """Four processes save and read every layout; two processes and then one read all that was saved."""
    run_case("saver_processes", "layouts", tmp_path, log=tmp_path / "log")
    found = {}
    for path in list_checkpoints(tmp_path / "checkpoints"):
        checkpoint = assert_equals_the_truth(path)
        found[checkpoint.state["layout"]] = checkpoint
    assert found.keys() == LAYOUTS.keys() - {"one"}
    assert [
        path.name for path in (tmp_path / "checkpoints").iterdir() if not path.name.startswith("step-")
    ] == []
    # Of 12 rows rank 0 has the first 3, rank 1 those from 6 on, rank 2 those from 3 on.
    strided = found["fsdp x tp"].groups["model"]["even"]
    rows = {file: box.offset[0] for file, box in zip(strided.files, strided.boxes, strict=True)}
    assert rows == {f"model-0000{rank}.safetensors": start for rank, start in enumerate([0, 6, 3, 9])}
    num_bytes = sum(tensor.nbytes for group in whole().values() for tensor in group.values())
    for layout in ("ddp", "hsdp", "hsdp x tp"):
        written = [0] * 4
        for name in found[layout].records:
            file = found[layout].path / name
            written[int(name[-17:-12])] += file.stat().st_size - header_bytes(file)
        assert sum(written) == num_bytes  # each piece once
        # The work is shared out to the size of the largest tensor.
        assert max(written) - min(written) <= whole()["model"]["even"].nbytes


def header_bytes(file):
    return 8 + int.from_bytes(file.read_bytes()[:8], "little")


@forks
def test_a_failure_on_one_process_is_everybodys(tmp_path):
    run_case("saver_processes", "faults", tmp_path, log=tmp_path / "log")


@forks
@pytest.mark.parametrize("times", [10, pytest.param(50, marks=pytest.mark.soak)])
def test_kill_at_any_moment(times, tmp_path):
    run_case("saver_processes", "kills", tmp_path, times, log=tmp_path / "log")


@forks
def test_a_program_that_ends_while_saving(tmp_path):
    said = run_case("saver_processes", "end", tmp_path, log=tmp_path / "log")
    open_checkpoint(tmp_path / "whole" / "step-00000001").verify()
    assert "step-00000001: cannot be written: File too large" in said
    assert list((tmp_path / "failed").iterdir()) == []


def make(value, size=4):
    return {"model": {"w": torch.full((size, 3), float(value))}, "optimizer": {"w/step": torch.tensor(2.0)}}


def test_what_changes_after_begin_is_not_saved(tmp_path):
    """A save that is held up half way sees nothing of the next steps, and the next save waits for it."""
    tensors, state = make(1), {"losses": [1.0]}
    reached, go_on = threading.Event(), threading.Event()
    done = []

    def finish(path):
        reached.set()
        assert go_on.wait(60)
        done.append(path.name)

    with Saver(tmp_path) as saver:
        stall = saver.begin(1, tensors, state, finish)
        tensors["model"]["w"].fill_(2)
        state["losses"].append(2.0)
        assert reached.wait(60)
        assert stall > 0
        assert not saver.failed
        assert done == []
        threading.Timer(0.05, go_on.set).start()
        saver.begin(2, tensors, state, lambda path: done.append(path.name))
        assert done[0] == "step-00000001"
        saver.begin(
            3, {"model": {"w": torch.arange(3)}}, {}, lambda path: done.append(path.name)
        )  # other shapes in the same buffers
    assert done == ["step-00000001", "step-00000002", "step-00000003"]
    for step, value, losses in ((1, 1, [1.0]), (2, 2, [1.0, 2.0])):
        checkpoint = open_checkpoint(tmp_path / f"step-{step:08d}")
        assert checkpoint.state == {"step": step, "losses": losses}
        assert torch.equal(checkpoint.read("model", "w"), torch.full((4, 3), float(value)))
    assert torch.equal(open_checkpoint(tmp_path / "step-00000003").read("model", "w"), torch.arange(3))


def test_saving_a_step_again_replaces_it_and_finish_prunes(tmp_path):
    with Saver(tmp_path) as saver:
        for step, value in ((7, 1), (7, 2), (8, 3), (9, 4)):
            saver.begin(
                step,
                make(value),
                {"value": value},
                lambda path: prune_checkpoints(tmp_path, keep_last=2, best=None),
            )
    assert [open_checkpoint(path).state for path in list_checkpoints(tmp_path)] == [
        {"step": 8, "value": 3},
        {"step": 9, "value": 4},
    ]
    umask = os.umask(0)
    os.umask(umask)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "step-00000009").iterdir()} == {
        0o666 & ~umask
    }


def test_a_state_that_is_not_json_is_refused_at_once(tmp_path):
    with Saver(tmp_path) as saver:
        for state in ({"loss": float("nan")}, {"loss": torch.ones(1)}):
            with pytest.raises((ValueError, TypeError), match="JSON"):
                saver.begin(1, make(1), state)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(disk_of):
    """A disk of 1 MB."""
    return disk_of("1m")


def test_a_full_disk_leaves_the_earlier_checkpoint(small_disk):
    with Saver(small_disk) as saver:
        saver.begin(1, make(1, 20_000), {})
        saver.wait()
        saver.begin(2, make(2, 200_000), {})
        message = r"step-00000002: cannot be written: No space left on device; earlier checkpoints are intact"
        with pytest.raises(UserError, match=message):
            saver.begin(3, make(3), {})  # where the loop learns of it
        assert [path.name for path in small_disk.iterdir()] == ["step-00000001"]
        checkpoint = open_checkpoint(small_disk / "step-00000001")
        checkpoint.verify()
        assert torch.equal(checkpoint.read("model", "w"), make(1, 20_000)["model"]["w"])
        del checkpoint
        saver.begin(3, make(3), {})
    assert [path.name for path in list_checkpoints(small_disk)] == ["step-00000001", "step-00000003"]


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with Saver(tmp_path / "file") as saver:
        saver.begin(1, make(1), {})
        with pytest.raises(UserError, match=r"step-00000001: cannot be written: "):
            saver.wait()
