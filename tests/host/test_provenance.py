"""The record of a folder: relative paths, hashes, and what a damaged one does."""

import hashlib
import json
import shutil

import pytest

from lumi.config import UserError
from lumi.host.provenance import (
    PROVENANCE_FILE,
    Parent,
    from_plain,
    read_provenance,
    record_files,
    to_plain,
    write_provenance,
)
from lumi.host.storage import atomic_folder


def write(folder, parents, known=None):
    with atomic_folder(folder) as temporary:
        (temporary / "weights").write_bytes(b"weights")
        (temporary / "README.md").write_text("a card, which people may change")
        write_provenance(temporary, "model", parents, record_files(temporary, known))
    return folder


def test_what_is_written_is_read(tmp_path):
    parents = (
        Parent("corpus", tmp_path / "data" / "corpus", "ab" * 32),
        Parent("model", tmp_path, "cd" * 32),
    )
    found = read_provenance(write(tmp_path / "out" / "model", parents))
    assert (found.kind, found.parents) == ("model", parents)
    assert found.files == {"weights": {"size": 7, "sha256": hashlib.sha256(b"weights").hexdigest()}}


def test_hashes_that_are_known_are_not_computed_again(tmp_path):
    known = {"weights": {"size": 7, "sha256": "from the writer"}}
    assert read_provenance(write(tmp_path / "model", (), known)).files == known


def test_links_move_with_the_folders_and_equal_work_gives_equal_bytes(tmp_path):
    for place in ("here", "there"):
        write(tmp_path / place / "model", [Parent("corpus", tmp_path / place / "corpus", "ab")])
    here, there = (tmp_path / place / "model" / PROVENANCE_FILE for place in ("here", "there"))
    assert here.read_bytes() == there.read_bytes()
    assert str(tmp_path) not in here.read_text()
    shutil.move(tmp_path / "here", tmp_path / "moved")
    (parent,) = read_provenance(tmp_path / "moved" / "model").parents
    assert parent.path.resolve() == tmp_path / "moved" / "corpus"


def test_a_folder_behind_a_link_is_found(tmp_path):
    (tmp_path / "disk" / "deep").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "deep")
    (parent,) = read_provenance(
        write(tmp_path / "link" / "model", [Parent("corpus", tmp_path, "ab")])
    ).parents
    assert parent.path.resolve() == tmp_path


def test_unknown_parents_are_not_none_at_all(tmp_path):
    assert read_provenance(write(tmp_path / "unknown", None)).parents is None
    assert read_provenance(write(tmp_path / "nothing", ())).parents == ()
    assert to_plain(None, tmp_path) is None is from_plain(None, tmp_path)
    (tmp_path / "older").mkdir()
    assert read_provenance(tmp_path / "older") is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("files"), "must give a kind, parents and the SHA-256 of files"),
        (lambda data: data.update(files={"../../secret": data["files"]["weights"]}), "it is damaged"),
        (lambda data: data.update(files={"weights": {"size": 7}}), "it is damaged"),
        (lambda data: data.update(parents=["corpus"]), "must each have kind, path and identity"),
        (lambda data: data.update(parents=7), "must each have kind, path and identity"),
        (lambda data: data.update(format=2), "format must be 1, got 2; verify with the version"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, change, message):
    path = write(tmp_path / "model", ()) / PROVENANCE_FILE
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))
    with pytest.raises(UserError, match=message):
        read_provenance(path.parent)
