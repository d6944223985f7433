import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lumi.config import UserError
from lumi.host.storage import (
    DamagedError,
    atomic_folder,
    check_file,
    check_output,
    check_output_file,
    discard_folders,
    file_record,
    is_empty,
    remove_folder,
    sha256_file,
    sweep_dead,
    sweep_temporaries,
)


def test_a_folder_appears_whole(tmp_path):
    with atomic_folder(tmp_path / "a" / "b") as temporary:
        (temporary / "x").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o777 & ~umask


def test_a_failure_leaves_nothing_new_and_nothing_broken(tmp_path):
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "x").write_text("1")

    def fail(replace):
        with atomic_folder(tmp_path / "old", replace=replace) as temporary:
            (temporary / "x").write_text("2")
            raise OSError("disk full")

    for replace in (True, False):
        with pytest.raises(OSError, match="disk full"):
            fail(replace)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "x").read_text() == "1"


def test_replace(tmp_path):
    for text in ("1", "2"):
        with atomic_folder(tmp_path / "f", replace=True) as temporary:
            (temporary / "x").write_text(text)
    assert [path.name for path in tmp_path.iterdir()] == ["f"]
    assert (tmp_path / "f" / "x").read_text() == "2"
    with pytest.raises(OSError, match="not empty"), atomic_folder(tmp_path / "f") as temporary:
        (temporary / "y").write_text("3")
    assert (tmp_path / "f" / "x").read_text() == "2"


@pytest.mark.parametrize("exists", [True, False], ids=["to a folder", "to nothing yet"])
def test_a_link_is_followed(exists, tmp_path):
    link, target = tmp_path / "link", tmp_path / "elsewhere" / "f"
    if exists:
        target.mkdir(parents=True)
    link.symlink_to(target)
    for text in ("1", "2"):
        with atomic_folder(link, replace=True) as temporary:
            assert temporary.parent == target.parent
            (temporary / "x").write_text(text)
    assert (link.is_symlink(), (target / "x").read_text()) == (True, "2")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["elsewhere", "f", "link", "x"]
    remove_folder(link)
    assert not target.exists()


def test_a_mount_point_is_no_output_that_is_renamed(disk_of):
    disk = disk_of("1m")
    (disk / "with space").mkdir()
    check_output(disk, renamed=False)
    check_output(disk / "new" / "f", renamed=True)
    check_output(disk / "with space", renamed=True)
    subprocess.run(["mount", "--bind", disk / "with space", disk / "with space"], check=True)
    try:  # os.path.ismount does not see this one: it is on its parent's disk
        for place in (disk, disk / "with space"):
            with pytest.raises(
                UserError, match=f"--output-dir must be a folder .* got {place}, a mount point"
            ):
                check_output(place, renamed=True)
    finally:
        subprocess.run(["umount", disk / "with space"], check=True)


def test_an_output_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError, match=f"--cache-dir must be .*, got {tmp_path}/file/f: {tmp_path}/file is a"
    ):
        check_output(tmp_path / "file" / "f", renamed=False, option="--cache-dir")
    (tmp_path / "f").mkdir()
    real = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and real(path, mode))
    check_output(tmp_path / "f", renamed=False)
    with pytest.raises(UserError, match=f"can be replaced, got {tmp_path}/f, in {tmp_path}, which cannot be"):
        check_output(tmp_path / "f", renamed=True)
    with pytest.raises(
        UserError, match=f"got {tmp_path}/g: {tmp_path} is a folder that cannot be written to"
    ):
        check_output(tmp_path / "g", renamed=True)


def test_sweep(tmp_path):
    (tmp_path / ".tmp-step-1-99").mkdir()
    (tmp_path / ".tmp-step-1-99" / "x").write_text("1")
    (tmp_path / "step-1").mkdir()
    assert sweep_temporaries(tmp_path) == [".tmp-step-1-99"]
    assert [path.name for path in tmp_path.iterdir()] == ["step-1"]


def test_sweep_takes_what_is_ours_alone(tmp_path):
    ours = [".tmp-rehearsal", ".tmp-step-1-99", ".tmp-step-1-discarded", ".tmp-step-1-99-displaced"]
    foreign = [".tmp-x", ".tmp-", ".tmp-99", ".tmp-notes-of-mine", "step-1", ".tmp-link-7"]
    for name in [*ours, *foreign[:-1]]:
        (tmp_path / name / "inside").mkdir(parents=True)
    (tmp_path / foreign[-1]).symlink_to(tmp_path / "step-1")
    assert sweep_temporaries(tmp_path) == sorted(ours)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(foreign)


def test_what_is_renamed_is_on_the_disk_before_the_old_one_goes(tmp_path, monkeypatch):
    """And so are new parents in theirs."""
    done, descriptors = [], {}
    real = {name: getattr(os, name) for name in ("open", "fsync", "rename")}
    real_rmtree = shutil.rmtree

    def opened(path, *arguments, **keywords):
        descriptor = real["open"](path, *arguments, **keywords)
        descriptors[descriptor] = str(path)
        return descriptor

    def removed(path, *arguments, **keywords):
        if Path(path).exists():
            done.append(("remove", str(path)))
        real_rmtree(path, *arguments, **keywords)

    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(
        os,
        "fsync",
        lambda descriptor: done.append(("fsync", descriptors[descriptor])) or real["fsync"](descriptor),
    )
    monkeypatch.setattr(
        os,
        "rename",
        lambda source, target: done.append(("rename", str(target))) or real["rename"](source, target),
    )
    monkeypatch.setattr(shutil, "rmtree", removed)
    folder = tmp_path / "a" / "b" / "f"
    with atomic_folder(folder):
        assert sorted(done) == [("fsync", str(tmp_path)), ("fsync", str(tmp_path / "a"))]
    done.clear()
    with atomic_folder(folder, replace=True):
        pass
    displaced = str(folder.parent / f".tmp-f-{os.getpid()}-displaced")
    (temporary, *rest) = done
    assert temporary == ("fsync", str(folder.parent / f".tmp-f-{os.getpid()}"))
    assert rest == [
        ("rename", displaced),
        ("rename", str(folder)),
        ("fsync", str(folder.parent)),
        ("remove", displaced),
    ]


def test_sweep_puts_back_what_was_moved_aside_for_a_folder_that_never_came(tmp_path, monkeypatch):
    """A kill between the two renames of `replace`."""
    with atomic_folder(tmp_path / "f-1") as temporary:
        (temporary / "x").write_text("old")
    real = os.rename

    def killed_at_the_second(source, target):
        if Path(target).name == "f-1":
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(os, "rename", killed_at_the_second)
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "f-1", replace=True) as temporary:
        (temporary / "x").write_text("new")
    monkeypatch.undo()
    assert not (tmp_path / "f-1").exists()
    sweep_temporaries(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["f-1"]
    assert (tmp_path / "f-1" / "x").read_text() == "old"


@pytest.fixture
def dead_pid():
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait(timeout=60)
    return process.pid


def test_sweep_dead_takes_what_dead_processes_left_of_this_folder(tmp_path, dead_pid):
    litter = tmp_path / f".tmp-f-{dead_pid}"
    kept = [
        f".tmp-f-{os.getppid()}",  # of a live process
        f".tmp-f-{os.getpid()}",
        f".tmp-other-{dead_pid}",
        f".tmp-f-g-{dead_pid}",
        ".tmp-f-notes",
        "f",
    ]
    for name in (litter.name, *kept):
        (tmp_path / name / "inside").mkdir(parents=True)
    sweep_dead(tmp_path / "f")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


def test_a_folder_that_is_removed_is_gone_at_once(tmp_path, monkeypatch):
    folder = tmp_path / "f"
    (folder / "inside").mkdir(parents=True)

    def killed(path):
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        remove_folder(folder)
    assert [path.name for path in tmp_path.iterdir()] == [f".tmp-f-{os.getpid()}"]
    monkeypatch.undo()
    folder.mkdir()
    (tmp_path / f".tmp-f-{os.getpid()}" / "inside").rmdir()
    (tmp_path / f".tmp-f-{os.getpid()}").rmdir()
    remove_folder(folder)
    assert list(tmp_path.iterdir()) == []


def test_discard_names_what_cannot_be_deleted_and_tries_it_again(tmp_path, monkeypatch):
    for name in ("a", "b", "kept"):
        (tmp_path / name / "inside").mkdir(parents=True)
    real = shutil.rmtree

    def stuck(path):
        if "-b-" in Path(path).name:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(shutil, "rmtree", stuck)
    faults = discard_folders(tmp_path, ["a", "b", "nowhere"])
    assert faults == [
        f"{tmp_path / 'nowhere'}: cannot be removed: No such file or directory",
        f"{tmp_path / '.tmp-b-discarded'}: cannot be removed: Input/output error",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == [".tmp-b-discarded", "kept"]
    monkeypatch.undo()
    assert discard_folders(tmp_path, []) == []
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_check_file(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"hello")
    record = file_record(path)
    assert record == {"size": 5, "sha256": "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"}
    assert sha256_file(path) == record["sha256"]
    check_file(path, record, remedy="mend it")
    path.write_bytes(b"hellp")
    check_file(path, record, remedy="mend it", check_hash=False)
    with pytest.raises(
        DamagedError, match=r"x: SHA-256 must be 2cf24.*, got .*: the file is corrupt; mend it"
    ):
        check_file(path, record, remedy="mend it")
    path.write_bytes(b"hell")
    with pytest.raises(
        DamagedError, match=r"x: must be 5 bytes, got 4: the file is truncated or was changed; mend it"
    ):
        check_file(path, record, remedy="mend it", check_hash=False)
    path.unlink()
    with pytest.raises(DamagedError, match=r"x: is missing; mend it"):
        check_file(path, record, remedy="mend it")


def test_a_file_to_write_into(tmp_path):
    def check(path):
        check_output_file(path, "new or empty", is_empty)

    (tmp_path / "empty").touch()
    (tmp_path / "full").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "full")
    (tmp_path / "ahead").symlink_to(tmp_path / "new")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    before = set(tmp_path.iterdir())
    for name in ("empty", "new", "ahead", "/dev/null", "/dev/stdout"):
        check(tmp_path / name)
    for name in ("full", "link", "round"):
        with pytest.raises(UserError, match=f"--output must be new or empty, got {tmp_path / name}, a file"):
            check(tmp_path / name)
    with pytest.raises(UserError, match=f"--output must be a file, got the folder {tmp_path}"):
        check(tmp_path)
    for place in (tmp_path / "none" / "f", tmp_path / "full" / "f", Path("/proc/f")):
        with pytest.raises(UserError, match=f"must be a file in a folder that takes files, got {place};"):
            check(place)
    assert set(tmp_path.iterdir()) == before
