"""Who may write to a run's folder, what an interrupted run left there, and which checkpoint a run goes on
from."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lumi.training.run_folder
from lumi.checkpoint.checkpoint import list_checkpoints
from lumi.checkpoint.saver import Saver
from lumi.config import UserError
from lumi.host.storage import file_record
from lumi.parallel.process_group import process_group
from lumi.training.run_folder import RunFolder


@pytest.fixture
def folder(tmp_path):
    """A run with checkpoints of steps 4, 8 and 12."""
    folder = RunFolder(tmp_path / "run")
    save(folder, 4, 8, 12)
    (folder.path / "metrics.jsonl").write_text("")
    yield folder
    folder.release()


def save(folder, *steps):
    with Saver(folder.checkpoints) as saver:
        for step in steps:
            saver.begin(
                step, {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}, {"best": None}
            )


def steps(folder):
    return [int(path.name[-8:]) for path in list_checkpoints(folder.checkpoints)]


def find(folder, resume="auto"):
    """The step that it is gone on from, and what was said; as a run does in one process."""
    said = []
    with process_group("cpu") as world:
        found = folder.find(resume, world, said.append)
    return found and found.state["step"], said


def flip_last_bit(file):
    data = file.read_bytes()
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))


def rewrite_state(path, state):
    """As somebody would who knows how to make the manifest fit."""
    (path / "state.json").write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["state.json"] = file_record(path / "state.json")
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_claim_sweeps_what_is_ours_alone(folder):
    """A kill in the rehearsal, in a save, in writing the config, the status and the log; and a template of
    the user's."""
    (folder.checkpoints / ".tmp-rehearsal" / ".tmp-step-00000000-9").mkdir(parents=True)
    (folder.checkpoints / ".tmp-step-00000016-9").mkdir()
    ours = ["config.json.tmp-12", "status.json.tmp-3", "metrics.jsonl.tmp"]
    foreign = ["prompt.json.tmpl", "notes.json.tmp-1", "config.json.tmp-x", "config.json.tmp"]
    for name in ours + foreign:
        (folder.path / name).write_text("")
    swept = folder.claim("auto")
    assert sorted(Path(name).name for name in swept) == sorted(
        [".tmp-rehearsal", ".tmp-step-00000016-9", *ours]
    )
    assert sorted(path.name for path in folder.path.iterdir()) == sorted(
        [".lock", "checkpoints", "metrics.jsonl", *foreign]
    )
    assert steps(folder) == [4, 8, 12]


def test_a_rehearsal_that_was_killed_does_not_stop_the_next_start(start, tmp_path):
    (tmp_path / "run" / "checkpoints" / ".tmp-rehearsal" / ".tmp-step-00000000-9").mkdir(parents=True)
    start(num_steps=1)
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000001"]


def test_auto_falls_back_for_wrong_content(folder):
    flip_last_bit(folder.checkpoint(12) / "model-00000.safetensors")
    (folder.checkpoint(8) / "manifest.json").write_text('{"format": 2')
    step, (first, second) = find(folder)
    assert step == 4
    assert first.endswith("the file is corrupt; trying the checkpoint before it")
    assert "manifest.json: not valid JSON" in second
    assert "--resume" not in first + second  # advice to do what is done anyway
    (folder.checkpoint(4) / "model-00000.safetensors").unlink()
    with pytest.raises(
        UserError,
        match=r"none of 3 checkpoints is whole; the newest: "
        r".*step-00000012/model-00000\.safetensors: SHA-256 must",
    ):
        find(folder)
    with pytest.raises(
        UserError, match=r"is missing; resume from another one: --resume-from-checkpoint PATH, or auto"
    ):
        find(folder, str(folder.checkpoint(4)))


def test_auto_does_not_fall_back_for_anything_else(folder, monkeypatch):
    """A disk that fails for a moment, another version of Lumi, values that no run writes: an older checkpoint
    is no answer to them."""
    manifest = folder.checkpoint(12) / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(whole.replace('"format": 2', '"format": 3'))
    with pytest.raises(
        UserError,
        match=r"manifest\.json: format must be 2, got 3; resume with the version of Lumi that wrote it",
    ):
        find(folder)
    manifest.write_text(whole)
    for name, call in (
        ("manifest.json", "read_text"),
        ("model-00000.safetensors", "stat"),
        ("model-00000.safetensors", "open"),
    ):
        real = open if call == "open" else getattr(Path, call)

        def failing(path, *arguments, name=name, real=real, **keywords):
            if str(path) == str(folder.checkpoint(12) / name):
                raise OSError(5, "Input/output error", str(path))
            return real(path, *arguments, **keywords)

        with monkeypatch.context() as patched:
            patched.setattr("builtins.open" if call == "open" else f"pathlib.Path.{call}", failing)
            with pytest.raises(UserError, match=rf"step-00000012/{name}: cannot be read: Input/output error"):
                find(folder)
    assert find(folder) == (12, [])


@pytest.mark.parametrize(
    ("state", "message"),
    [
        ({}, r"step must be a whole number from 0, got None"),
        ([], r"step must be a whole number from 0, got None"),
        ({"step": 12.0, "best": None}, r"step must be a whole number from 0, got 12\.0"),
        ({"step": True, "best": None}, r"step must be a whole number from 0, got True"),
        ({"step": 8, "best": None}, r"step must be 12, as the folder's name says, got 8"),
        ({"step": 12}, r"best must be null, or a step and a loss"),
        ({"step": 12, "best": 5}, r"best must be null, or a step and a loss, got 5"),
        ({"step": 12, "best": {"step": 4}}, r"best must be null, or a step and a loss"),
        ({"step": 12, "best": {"step": "4", "loss": 1.0}}, r"best must be null, or a step and a loss"),
        ({"step": 12, "best": {"step": 4, "loss": None}}, r"best must be null, or a step and a loss"),
    ],
    ids=str,
)
def test_a_state_that_no_run_writes_is_refused(folder, state, message):
    rewrite_state(folder.checkpoint(12), state)
    with pytest.raises(UserError, match=rf"step-00000012/state\.json: {message}"):
        find(folder)


def test_best_is_kept_where_it_is_here(folder):
    for best, kept in (
        ({"step": 4, "loss": 1.5}, {"step": 4, "loss": 1.5}),
        ({"step": 5, "loss": 1.5}, None),
        (None, None),
    ):
        rewrite_state(folder.checkpoint(12), {"step": 12, "best": best})
        assert folder.load(folder.checkpoint(12)).state["best"] == kept


def test_later_checkpoints_make_way_when_a_new_one_is_whole_and_not_before(folder):
    folder.claim("auto")
    assert folder.abandon_after(4) == ["step-00000008", "step-00000012"]
    assert steps(folder) == [4]
    aside = folder.checkpoints / ".abandoned-after-step-00000004"
    assert sorted(path.name for path in aside.iterdir()) == ["step-00000008", "step-00000012"]
    save(folder, 6)
    assert aside.exists()
    assert folder.prune(keep_last=2, best=None) == []
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


def test_a_run_that_dies_before_it_has_saved_anew_loses_nothing(folder):
    folder.claim("auto")
    folder.abandon_after(4)
    folder.release()
    again, said = RunFolder(folder.path), []
    assert again.claim("auto", said.append) == []
    again.release()
    assert steps(folder) == [4, 8, 12]
    assert [line.split(":")[0] for line in said] == ["step-00000008", "step-00000012"]
    assert find(folder) == (12, [])
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]


def test_a_run_that_dies_between_its_save_and_pruning_has_the_new_ones_alone(folder):
    """Also where the new ones are of other steps than the old ones."""
    folder.claim("auto")
    folder.abandon_after(4)
    save(folder, 6)
    folder.claim("auto")
    assert steps(folder) == [4, 6]
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("renames", range(4))
def test_killed_while_setting_aside_or_putting_back(folder, monkeypatch, renames):
    """After any number of renames: all are there in the end."""
    real, left = os.rename, [0]

    def killed(source, target):
        if left[0] == 0:
            raise KeyboardInterrupt
        left[0] -= 1
        real(source, target)

    monkeypatch.setattr(os, "rename", killed)
    left[0] = renames
    if renames < 3:
        with pytest.raises(KeyboardInterrupt):
            folder.abandon_after(4)
    else:
        folder.abandon_after(4)
    left[0] = 1
    with contextlib.suppress(KeyboardInterrupt):
        folder.claim("auto")
    monkeypatch.undo()
    folder.claim("auto")
    assert sorted(path.name for path in folder.checkpoints.iterdir()) == [
        "step-00000004",
        "step-00000008",
        "step-00000012",
    ]


def test_a_prune_that_fails_is_a_line_and_no_error(folder, monkeypatch):
    real = shutil.rmtree

    def busy(path, *arguments, **keywords):
        raise OSError(39, "Directory not empty", str(path))

    folder.abandon_after(8)
    monkeypatch.setattr(shutil, "rmtree", busy)
    faults = folder.prune(keep_last=1, best=None)
    assert len(faults) == 2
    assert all(line.endswith("cannot be removed: Directory not empty") for line in faults)
    monkeypatch.setattr(shutil, "rmtree", real)
    assert folder.prune(keep_last=1, best=None) == []
    assert [path.name for path in folder.checkpoints.iterdir()] == ["step-00000008"]
    shutil.rmtree(folder.checkpoints)
    folder.checkpoints.write_text("")
    (fault,) = folder.prune(keep_last=1, best=None)
    assert fault.endswith("checkpoints: old checkpoints cannot be removed: Not a directory")


HOLDER = """
import os, sys, time
from lumi.training.run_folder import RunFolder
RunFolder(sys.argv[1]).claim("auto")
child = os.fork()
if child:
    print(child, flush=True)
time.sleep(600)
"""


def test_a_second_run_in_the_folder_is_refused_until_the_first_has_ended(folder, monkeypatch):
    """The first one is killed, while a child that it has forked lives on."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder.path)], stdout=subprocess.PIPE, text=True
    )
    child = None
    try:
        child = int(holder.stdout.readline())
        half_written = folder.checkpoints / f".tmp-step-00000016-{holder.pid}"
        half_written.mkdir()
        monkeypatch.setattr(lumi.training.run_folder, "LOCK_WAIT_SECONDS", 0.3)
        said = []
        with pytest.raises(
            UserError,
            match=rf"no run is at work in, got .*run, which host .*, pid {holder.pid} is writing to; "
            r"end that one",
        ):
            folder.claim("auto", said.append)
        assert len(said) == 1
        assert f"pid {holder.pid}): waiting up to 0 s for its end" in said[0]
        assert half_written.exists()
        holder.kill()
        holder.wait(timeout=60)
        monkeypatch.undo()
        assert folder.claim("auto", said.append) == [str(half_written)]
        os.kill(child, 0)  # it is there
        assert (folder.path / ".lock").read_text().endswith(f"pid {os.getpid()}\n")
    finally:
        holder.kill()
        holder.wait(timeout=60)
        if child is not None:
            os.kill(child, signal.SIGKILL)
        holder.stdout.close()


def test_released_it_is_free_for_other_processes(folder):
    folder.claim("auto")
    folder.release()
    folder.release()
    code = "import sys, fcntl; fcntl.lockf(open(sys.argv[1], 'r+'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    assert (
        subprocess.run([sys.executable, "-c", code, str(folder.path / ".lock")], timeout=60).returncode == 0
    )
    folder.claim("auto")
    assert (
        subprocess.run(
            [sys.executable, "-c", code, str(folder.path / ".lock")], stderr=subprocess.DEVNULL, timeout=60
        ).returncode
        == 1
    )
    with pytest.raises(UserError, match="must be new"):
        folder.claim(None)
    assert (
        subprocess.run([sys.executable, "-c", code, str(folder.path / ".lock")], timeout=60).returncode == 0
    )
