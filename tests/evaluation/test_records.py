"""Local files as they are written, the hub through a stand-in for `datasets`."""

import json
import sys
from types import SimpleNamespace

import pytest

from lumi.config import UserError, from_dict
from lumi.evaluation.records import (
    HubSource,
    JsonlSource,
    TextSource,
    describe,
    read_records,
    text_field,
    tightest,
)


def test_local_files_in_order(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"a": 3}\n')
    (tmp_path / "a.jsonl").write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n\n{"a": "\xe2\x80\xa8"}\n')
    source = JsonlSource(paths=(str(tmp_path / "*.jsonl"),))
    assert read_records(source) == [{"a": 1}, {"a": "\u2028"}, {"a": 3}]
    assert read_records(source, 2) == [{"a": 1}, {"a": "\u2028"}]
    (tmp_path / "t.txt").write_text("one\n\ntwo")
    assert read_records(TextSource(paths=(str(tmp_path / "t.txt"),))) == [{"text": "one\n\ntwo"}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\nnot json\n', "x.jsonl:2: must be a JSON object, got a line that is not valid JSON"),
        (b"[1]\n", "x.jsonl:1: must be a JSON object, got list"),
        (b'{"a": "\xff"}\n', "x.jsonl: must be UTF-8, got another byte at 7"),
        (b'\xef\xbb\xbf{"a": "\xff"}\n', "x.jsonl: must be UTF-8, got another byte at 10"),
        (
            b"{}\n" + b"[" * 100_000,
            "x.jsonl:2: must be a JSON object, got a line that is not valid JSON: maximum recursion depth",
        ),
        (b"\n\n", "jsonl: x.jsonl: must hold at least one record, got none"),
        (None, "paths must match at least one file, got 'x.jsonl'"),
    ],
)
def test_bad_files(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_records(JsonlSource(paths=("x.jsonl",)))
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


def test_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return ({"n": i} for i in range(10**9))

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    source = HubSource(dataset="allenai/ai2_arc", subset="ARC-Easy", split="test", revision="abc")
    assert read_records(source, 3) == [{"n": 0}, {"n": 1}, {"n": 2}]
    assert asked == [
        (("allenai/ai2_arc", "ARC-Easy"), {"split": "test", "revision": "abc", "streaming": True})
    ]
    assert describe(source) == "hub: allenai/ai2_arc / ARC-Easy / test / abc"


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(
        UserError, match=r"^hub: a/b / validation: cannot be read: no route; check its name and your network"
    ):
        read_records(HubSource(dataset="a/b"))


@pytest.mark.parametrize(
    ("cls", "data", "message"),
    [
        (HubSource, {"dataset": ""}, 'c: dataset must be a name, got ""'),
        (HubSource, {"dataset": "a", "split": ""}, 'c: split must be a name, got ""'),
        (JsonlSource, {"paths": []}, "c: paths must hold at least one path or glob pattern, got []"),
        (TextSource, {"paths": [""]}, "c: paths must hold at least one path or glob pattern, got ['']"),
    ],
)
def test_bad_configs(cls, data, message):
    with pytest.raises(UserError) as error:
        from_dict(cls, json.loads(json.dumps(data)), "c")
    assert str(error.value) == message
