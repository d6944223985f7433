"""Files behind URLs, in fsspec's file system in memory, which is made to fail."""

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import lumi.host.remote
from lumi.config import UserError
from lumi.host.remote import RemoteFolder
from lumi.host.storage import MissingError


@pytest.fixture
def waits(monkeypatch):
    """The waits that were asked for, instead of them."""
    asked = []
    monkeypatch.setattr(lumi.host.remote.time, "sleep", asked.append)
    return asked


@pytest.fixture
def folder(tmp_path):
    """A URL with the file `data`."""
    url = f"memory://{tmp_path.name}"
    MemoryFileSystem().pipe(f"{url}/data", b"0123456789")
    return RemoteFolder(url + "/")


def failing(real, calls, times, error):
    def called(*arguments, **more):
        calls.append(arguments[1])
        if len(calls) <= times:
            raise error
        return real(*arguments, **more)

    return called


def fail(monkeypatch, times, error):
    """Let the first `times` calls of each way to read fail; returns a list of the calls."""
    calls = []
    for name in ("cat_file", "get_file"):
        monkeypatch.setattr(
            MemoryFileSystem, name, failing(getattr(MemoryFileSystem, name), calls, times, error)
        )
    return calls


def accept(_):
    pass


def test_parts_and_whole_files(folder, tmp_path):
    assert folder.read("data", 2, 5, accept) == b"234"
    folder.fetch("data", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"


@pytest.mark.parametrize("error", [OSError("reset"), TimeoutError("slow"), RuntimeError("of a client")])
def test_what_fails_twice_comes_at_the_third_try(folder, tmp_path, monkeypatch, waits, error):
    fail(monkeypatch, 2, error)
    assert folder.read("data", 0, 3, accept) == b"012"
    assert waits == [1.0, 2.0]
    fail(monkeypatch, 2, error)
    folder.fetch("data", tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == b"0123456789"
    assert [path.name for path in tmp_path.iterdir()] == ["copy"]


def test_what_never_comes_is_named_in_one_line(folder, tmp_path, monkeypatch, waits):
    calls = fail(monkeypatch, 100, OSError("the line\nis dead"))
    expected = (
        rf"^{folder.url}/data: cannot be fetched, after 6 tries: OSError: the line is dead; see that .*$"
    )
    with pytest.raises(UserError, match=expected):
        folder.read("data", 0, 3, accept)
    assert (len(calls), waits) == (6, [1.0, 2.0, 4.0, 8.0, 16.0])
    with pytest.raises(UserError, match=expected):
        folder.fetch("data", tmp_path / "copy")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_there_is_not_waited_for(folder, tmp_path, monkeypatch, waits):
    with pytest.raises(MissingError, match=rf"^{folder.url}/other: is missing; check the URL"):
        folder.fetch("other", tmp_path / "copy")
    fail(monkeypatch, 1, PermissionError("403"))
    with pytest.raises(UserError, match=rf"^{folder.url}/data: cannot be read; check .* who may read it"):
        folder.read("data", 0, 3, accept)
    assert waits == []


def test_a_copy_that_is_not_what_it_must_be_is_fetched_again(folder, tmp_path, waits):
    seen = []

    def check(copy):
        seen.append(copy)
        if len(seen) < 3:
            raise UserError("the hash", "must be another", got="this")

    assert folder.read("data", 8, 10, check) == b"89"
    assert seen == [b"89"] * 3
    (tmp_path / "copy").write_bytes(b"old")

    def refuse(copy):
        assert copy.read_bytes() == b"0123456789"
        raise UserError("the hash", "must be another", got="this")

    with pytest.raises(UserError, match=r"after 6 tries: UserError: the hash must be another, got this"):
        folder.fetch("data", tmp_path / "copy", refuse)
    assert (tmp_path / "copy").read_bytes() == b"old"


def test_protocols_that_cannot_be_opened(monkeypatch):
    with pytest.raises(
        UserError, match=r"^nonsense://x: must be a URL that fsspec opens.*, got Protocol not"
    ):
        RemoteFolder("nonsense://x")
    import fsspec

    def lacking(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec, "url_to_fs", lacking)
    with pytest.raises(
        UserError, match=r"got Install s3fs to access S3; .*pip install 'lumi-train\[remote\]'"
    ):
        RemoteFolder("s3://bucket/x")
