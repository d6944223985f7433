import os

import pytest

from lumi.config import UserError
from lumi.host.file_patterns import check_patterns, matching_files


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.json", "deep/er/d.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (["*.txt"], ["a.txt", "b.txt"]),
        (["c.json", "*.txt", "a.*"], ["c.json", "a.txt", "b.txt"]),  # the order of the patterns, none twice
        (["**/*.txt"], ["a.txt", "b.txt", "deep/er/d.txt"]),
        (["*"], ["a.txt", "b.txt", "c.json"]),  # no folders
        (["deep"], ["deep/er/d.txt"]),
        (["."], ["./a.txt", "./b.txt", "./c.json", "./deep/er/d.txt"]),
    ],
)
def test_patterns_match_files(folder, paths, expected):
    assert matching_files(paths) == expected


def test_a_tilde_is_the_home_folder(folder):
    assert matching_files(["~/a.txt"]) == [str(folder / "a.txt")]


@pytest.mark.parametrize("pattern", ["*.parquet", "deep/*.txt", "no.txt"])
def test_a_pattern_without_files_is_refused(folder, pattern):
    with pytest.raises(UserError) as caught:
        matching_files(["a.txt", pattern])
    assert caught.value.subject == "paths"
    assert caught.value.got == f"{pattern!r} (looked from {os.getcwd()})"


@pytest.mark.parametrize("paths", [(), ("",), ("a.txt", "")])
def test_empty_paths_are_refused(paths):
    with pytest.raises(UserError, match="paths must hold at least one path or glob pattern, got"):
        check_patterns(paths)
    check_patterns(["a.txt"])


def test_a_broken_link_is_refused_and_not_passed_over(folder):
    (folder / "x.txt").symlink_to("gone.txt")
    for pattern in ("*.txt", "x.txt"):
        with pytest.raises(UserError, match=r"paths must match files that exist, got x.txt, a broken link"):
            matching_files([pattern])
