"""Local files as they are written, the hub through a stand-in for `datasets`."""

import json
import sys
from types import SimpleNamespace

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import HubDataset, JsonFiles, JsonlFiles, TextFiles
from lumi.evaluation.records import read_records, text_field, tightest


def test_local_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": 3}\n')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xe2\x80\xa8"}\n')
    source = JsonlFiles(paths=(str(tmp_path / "*.jsonl"),))
    assert read_records(source) == [{"a": 1}, {"a": "\u2028"}, {"a": 3}]
    assert read_records(source, 2) == [{"a": 1}, {"a": "\u2028"}]
    (tmp_path / "t.txt").write_text("one\n\ntwo")
    assert read_records(TextFiles(paths=(str(tmp_path / "t.txt"),))) == [{"text": "one\n\ntwo"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\nnot json\n', "x.jsonl:2: not valid JSON: Expecting value"),
        (b"3\n", "x.jsonl:1: must be an object, got int"),
        (
            b"[1]\n",
            'x.jsonl:1: must be an object, got list; for a file that is one JSON array use kind "json"',
        ),
        (b'{}\n{"a": "\xff"}\n', "x.jsonl:2: invalid UTF-8 at byte 7 of the line"),
        (b'\xef\xbb\xbf{"a": "\xff"}\n', "x.jsonl:1: invalid UTF-8 at byte 7 of the line"),
        (b"{}\n" + b"[" * 100_000, "x.jsonl:2: not valid JSON: maximum recursion depth"),
        (b"\n\n", "jsonl: x.jsonl: must hold at least one record, got none"),
        (None, "paths must match at least one file, got 'x.jsonl'"),
    ],
)
def test_bad_files(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_records(JsonlFiles(paths=("x.jsonl",)))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_the_place_of_a_lone_surrogate_is_counted_in_the_field():
    with pytest.raises(
        UserError,
        match=r"^here: 'a': text must be valid Unicode, got the lone surrogate U\+D800 at character 2$",
    ):
        text_field({"b": "x", "a": "xx\ud800"}, "a", "here")


def test_the_tightest_limit():
    assert (tightest(None, None), tightest(3, None), tightest(None, 4), tightest(5, 4)) == (None, 3, 4, 4)


def test_line_ends_of_a_text_become_newlines(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_records(TextFiles(paths=(str(tmp_path / "t.txt"),))) == [{"text": "one\ntwo\nthree\n"}]


def test_an_array_of_records(tmp_path):
    (tmp_path / "a.json").write_text('[{"a": 1}, {"a": 2}, 3]')
    location = JsonFiles(paths=(str(tmp_path / "a.json"),))
    assert read_records(location, 2) == [{"a": 1}, {"a": 2}]
    with pytest.raises(UserError, match=r"a.json:item 3: must be an object, got int"):
        read_records(location)


def test_only_the_rows_that_are_wanted_are_read_from_the_hub(monkeypatch):
    def load_dataset(*_arguments, **_options):
        yield from ({"n": 0}, {"n": 1})
        raise ConnectionError("one row too many")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    assert read_records(HubDataset(dataset="a/b"), 2) == [{"n": 0}, {"n": 1}]
    with pytest.raises(
        UserError, match=r"^hub: a/b / validation cannot be read: one row too many; check its name"
    ):
        read_records(HubDataset(dataset="a/b"))


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (HubDataset, {"dataset": ""}, 'c: dataset must be a name, got ""'),
        (HubDataset, {"dataset": "a", "split": ""}, 'c: split must be a name, got ""'),
        (JsonlFiles, {"paths": []}, "c: paths must hold at least one path or glob pattern, got []"),
        (TextFiles, {"paths": [""]}, "c: paths must hold at least one path or glob pattern, got ['']"),
    ],
)
def test_bad_configs(cls, data, message):
    with pytest.raises(UserError) as error:
        from_dict(cls, json.loads(json.dumps(data)), "c")
    assert str(error.value) == message
