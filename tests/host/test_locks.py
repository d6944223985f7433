import errno
import os
import subprocess
import sys

import pytest

from lumi.host.locks import lock_file

HOLD = """
import os, sys, time
from lumi.host.locks import lock_file
lock_file(sys.argv[1], 0, print)
print("locked", flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def hold(tmp_path):
    """Starts a process that holds the lock of `tmp_path / "lock"` for some seconds; waits until it does."""
    processes = []

    def hold(seconds):
        command = [sys.executable, "-c", HOLD, str(tmp_path / "lock"), str(seconds)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout.readline() == "locked\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate(timeout=60)


def test_the_file_names_its_holder_and_a_process_does_not_block_itself(tmp_path):
    (tmp_path / "lock").write_text("host of a long name, pid 123456789\n")
    said = []
    descriptors = [lock_file(tmp_path / "lock", 0, said.append) for _ in range(2)]
    text = (tmp_path / "lock").read_text()
    assert text.startswith("host ")
    assert text.endswith(f", pid {os.getpid()}\n")
    assert said == []
    for descriptor in descriptors:
        os.close(descriptor)


def test_another_process_is_waited_for(tmp_path, hold):
    holder, said = hold(1), []
    os.close(lock_file(tmp_path / "lock", 60, said.append))
    assert len(said) == 1
    assert f"pid {holder.pid}): waiting up to 60 s for its end" in said[0]


def test_patience_ends_and_a_killed_process_holds_nothing(tmp_path, hold):
    holder = hold(60)
    with pytest.raises(BlockingIOError) as caught:
        lock_file(tmp_path / "lock", 0, lambda line: None)
    assert caught.value.strerror.endswith(f", pid {holder.pid}")
    holder.kill()
    holder.wait(timeout=60)
    os.close(lock_file(tmp_path / "lock", 0, pytest.fail))


def test_a_disk_without_locks_is_named(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def no_locks(descriptor, operation):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", no_locks)
    said = []
    os.close(lock_file(tmp_path / "lock", 60, said.append))
    assert len(said) == 1
    assert f"lock: cannot be locked on this disk: {os.strerror(errno.ENOLCK)}; take care that no" in said[0]


def test_a_system_without_locks_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows: it cannot be imported
    said = []
    os.close(lock_file(tmp_path / "lock", 60, said.append))
    assert said == [
        f"{tmp_path / 'lock'}: cannot be locked on this system; take care that no second run writes there"
    ]
    assert (tmp_path / "lock").read_text().endswith(f"pid {os.getpid()}\n")


def test_another_fault_is_raised(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def broken(descriptor, operation):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(fcntl, "lockf", broken)
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        lock_file(tmp_path / "lock", 60, pytest.fail)
