import contextlib
import gc
import os

import numpy as np
import pytest

from lumi.config import UserError
from lumi.data.stored_array import StoredArray


@pytest.fixture
def path(tmp_path):
    np.arange(10_000, dtype="<u4").tofile(tmp_path / "values")
    return tmp_path / "values"


def stored(path, length=10_000):
    return StoredArray(path, np.dtype("<u4"), length, remedy="copy it again")


def test_reads_what_a_slice_of_the_array_has(path):
    array, values = stored(path), np.arange(10_000)
    assert len(array) == 10_000
    for places in (
        slice(None),
        slice(0, 1),
        slice(17, 4000),
        slice(-3, None),
        slice(9_999, 20_000),
        slice(5, 5),
        slice(7, 3),
    ):
        assert array[places].tolist() == values[places].tolist()
        assert array[places].dtype == np.dtype("<u4")
    with pytest.raises(ValueError, match="places must be a slice of step 1"):
        array[::2]


def test_a_file_that_shrinks_while_it_is_open(path):
    array = stored(path)
    os.truncate(path, 4 * 5_000 + 2)  # a mapped file would end the process with SIGBUS here
    assert array[4_000:5_000].tolist() == list(range(4_000, 5_000))
    for places in (slice(5_000, 5_001), slice(4_999, 5_002), slice(9_000, None), slice(None)):
        with pytest.raises(
            UserError,
            match=r"values: must be 40000 bytes, got 20002: the file was truncated while .*; copy it again",
        ):
            array[places]
    # A file that grows is read as far as it was known.
    path.write_bytes(np.arange(10_000, dtype="<u4").tobytes() + b"more")
    assert array[:].tolist() == list(range(10_000))


def test_a_file_that_is_replaced_or_removed_is_read_as_it_was(path):
    array = stored(path)
    path.with_name("other").write_bytes(b"shorter")
    os.replace(path.with_name("other"), path)
    assert array[9_990:].tolist() == list(range(9_990, 10_000))
    path.unlink()
    assert array[9_990:].tolist() == list(range(9_990, 10_000))


def test_what_cannot_be_read_at_all(tmp_path, path):
    with pytest.raises(FileNotFoundError):
        stored(tmp_path / "nothing")
    # Reading a folder fails with EISDIR, as a failing disk does with EIO.
    array = StoredArray(tmp_path, np.dtype("<u4"), 10, remedy="copy it again")
    with pytest.raises(UserError, match=r"cannot be read: Is a directory; copy it again"):
        array[0:1]


def test_the_file_is_closed_with_the_array(path):
    def open_files():
        found = []
        for name in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # that of listdir itself
                found.append(os.readlink(f"/proc/self/fd/{name}"))
        return found.count(str(path))

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("needs Linux's /proc")
    array = stored(path)
    assert open_files() == 1
    del array
    gc.collect()
    assert open_files() == 0
