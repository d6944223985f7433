import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import (
    HubSource,
    JsonlSource,
    JsonSource,
    ParquetSource,
    PrepareConfig,
    PythonDocsSource,
    TextSource,
)
from lumi.corpus.conversations import AlpacaFormat, MessagesFormat, unpack
from lumi.corpus.oasst import OasstMessagesFormat
from lumi.corpus.reading import CHUNK_BYTES, open_source
from lumi.corpus.sources import find_files, identify


def read(source, max_chars=1000, skip=0):
    return list(open_source(source, max_chars, skip).records)


def texts(source, **options):
    return [record.text for record in read(source, **options)]


def jsonl(tmp_path, *lines, **fields):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return JsonlSource(name="x", paths=(str(path),), **fields)


def test_jsonl_reasons_name_file_and_line(tmp_path):
    lines = [
        '{"text": "ok"}',
        '{"text": ',
        "",
        b'{"text": "\xff"}',
        '["list"]',
        '{"id": 1}',
        '{"text": 5}',
        '{"text": null}',
        "[" * 99999,
    ]
    source = jsonl(tmp_path, *lines, '{"text": "\\ud83d"}\n\n')
    path = source.paths[0]
    records = read(source)
    assert [(record.text, record.reason) for record in records] == [
        ("ok", ""),
        (None, "malformed_json"),
        (None, "invalid_utf8"),
        (None, "malformed_json"),
        (None, "missing_text"),
        (None, "wrong_type"),
        (None, "missing_text"),
        (None, "malformed_json"),
        ("\ud83d", ""),
    ]
    assert records[1].detail.startswith(f"{path}:2: Expecting value")
    assert records[2].detail == f"{path}:4: invalid UTF-8 at byte 10 of the line"
    assert records[4].detail == f"{path}:6: no field 'text'; it has 'id'"
    assert records[5].detail == f"{path}:7: 'text' must be a string, got int"


def test_jsonl_that_is_an_array_hints_at_the_other_kind(tmp_path):
    hint = '; for a file that is one JSON array use kind "json"'
    for lines in (
        ['[{"text": "a"}]'],
        ["[", '{"text": "a"}', "]"],
        ['[{"text": "' + "a" * CHUNK_BYTES * 2 + '"}]'],
    ):
        first, *others = read(jsonl(tmp_path, *lines))
        assert first.text is None
        assert first.detail.endswith(hint)
        assert not any(record.detail.endswith(hint) for record in others)
    assert not any(record.detail.endswith(hint) for record in read(jsonl(tmp_path, "{", '["list"]')))


def test_jsonl_text_field_skip_bom_and_gzip(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"body": "a"}\n{"body": "b"}\n{"body": "c"}'))
    source = JsonlSource(name="x", paths=(str(path),), text_field="body")
    assert texts(source) == ["a", "b", "c"]
    assert texts(source, skip=2) == ["c"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"source 'x': .*data.jsonl.gz must be a readable jsonl file"):
        read(source)


def test_a_line_that_is_huge_is_passed_over_without_being_held(tmp_path):
    source = jsonl(tmp_path, '{"text": "a"}', json.dumps({"text": "x" * 3 * CHUNK_BYTES}), '{"text": "b"}')
    records = read(source, max_chars=10)
    assert [(record.text, record.reason) for record in records] == [("a", ""), (None, "too_long"), ("b", "")]
    assert f"{source.paths[0]}:2: a line of more than" in records[1].detail


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    values = pa.array([b"one", None, b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": values, "n": [1, 2, 3]}), path)
    records = read(ParquetSource(name="x", paths=(str(path),), text_field="body"))
    assert [(record.text, record.reason) for record in records] == [
        ("one", ""),
        (None, "missing_text"),
        (None, "invalid_utf8"),
    ]
    assert records[2].detail == f"{path}:row 3: invalid UTF-8 at byte 0"
    with pytest.raises(UserError, match=r"text_field must be a column of .*\(body, n\), got 'text'"):
        read(ParquetSource(name="x", paths=(str(path),)))
    with pytest.raises(UserError, match=r"column 'n' of .* must hold strings, got int64"):
        read(ParquetSource(name="x", paths=(str(path),), text_field="n"))
    path.write_bytes(b"no parquet")
    with pytest.raises(UserError, match=r"data.parquet must be a readable parquet file"):
        read(ParquetSource(name="x", paths=(str(path),)))


def test_parquet_of_dictionary_and_large_strings(tmp_path):
    for index, column in enumerate(
        [pa.array(["a", "b", "a"]).dictionary_encode(), pa.array(["a", "b", "a"], pa.large_string())]
    ):
        path = tmp_path / f"{index}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        assert texts(ParquetSource(name="x", paths=(str(path),))) == ["a", "b", "a"]


def said(record):
    return [message.content for message in unpack(record.text)]


def test_json_is_one_array(tmp_path):
    path = tmp_path / "data.json.gz"
    data = [{"text": "a"}, {"text": None}, 7, {"text": "ü"}]
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode()))
    records = read(JsonSource(name="x", paths=(str(path),)))
    assert [(record.text, record.reason) for record in records] == [
        ("a", ""),
        (None, "missing_text"),
        (None, "malformed_json"),
        ("ü", ""),
    ]
    assert records[2].detail == f"{path}:item 3: must be an object, got int"
    assert texts(JsonSource(name="x", paths=(str(path),)), skip=3) == ["ü"]


@pytest.mark.parametrize(
    ("content", "got"),
    [
        (b'{"a": 1}\n{"a": 2}\n', "Extra data"),
        (b'{"a": 1}', "dict"),
        (b"", "Expecting value"),
        (b'["\xff"]', "can't decode"),
        (b"[" * 99999, ""),
    ],
)
def test_json_that_is_no_array_is_refused(tmp_path, content, got):
    path = tmp_path / "data.json"
    path.write_bytes(content)
    with pytest.raises(
        UserError,
        match=rf'source \'x\': .*data.json must hold one JSON array of objects, got: .*{got}.* use kind "jsonl"',
    ):
        read(JsonSource(name="x", paths=(str(path),)))


def test_jsonl_with_conversations(tmp_path):
    lines = [
        '{"instruction": "q", "output": "a"}',
        '{"instruction": "q"}',
        "{",
        '{"instruction": "r", "output": "b"}',
    ]
    source = jsonl(tmp_path, *lines, conversation=AlpacaFormat())
    records = read(source)
    assert [record.reason for record in records] == ["", "missing_text", "malformed_json", ""]
    assert said(records[0]) == ["q", "a"]
    assert records[1].detail == f"{source.paths[0]}:2: no field 'output'; it has 'instruction'"
    assert read(source, skip=3) == records[3:]


def test_parquet_with_conversations(tmp_path):
    path = tmp_path / "data.parquet"
    turns = [{"role": "user", "content": "q", "extra": 1}, {"role": "assistant", "content": "a", "extra": 2}]
    pq.write_table(pa.table({"messages": [turns, None, []], "other": [1, 2, 3]}), path)
    records = read(ParquetSource(name="x", paths=(str(path),), conversation=MessagesFormat()))
    assert [record.reason for record in records] == ["", "missing_text", "malformed_messages"]
    assert said(records[0]) == ["q", "a"]
    assert records[2].detail.startswith(f"{path}:row 3: messages must be a list of at least one message")
    with pytest.raises(
        UserError,
        match=r"source 'x': .*data.parquet must have the columns instruction, output, got messages, other",
    ):
        read(ParquetSource(name="x", paths=(str(path),), conversation=AlpacaFormat()))


def test_parquet_with_conversations_that_are_not_utf8(tmp_path):
    path = tmp_path / "data.parquet"
    outputs = pa.Array.from_buffers(pa.string(), 2, pa.array([b"a", b"\xff"]).buffers())
    pq.write_table(pa.table({"instruction": ["q", "r"], "input": ["i", None], "output": outputs}), path)
    records = read(ParquetSource(name="x", paths=(str(path),), conversation=AlpacaFormat()))
    assert said(records[0]) == ["q\n\ni", "a"]
    assert (records[1].reason, records[1].detail) == (
        "invalid_utf8",
        f"{path}:row 2: invalid UTF-8 at byte 0",
    )


def test_text_is_a_document_per_file_or_per_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\ntwo\r\n\r\n\n\nthree\n".encode())
    whole = TextSource(name="x", paths=(str(path),))
    assert texts(whole) == ["one\r\n\r\ntwo\ntwo\r\n\r\n\n\nthree\n"]
    assert texts(TextSource(name="x", paths=(str(path),), separator="\n\n")) == ["one", "two\ntwo", "three"]
    assert texts(TextSource(name="x", paths=(str(path),), separator="two")) == ["one", "three"]
    path.write_bytes(b"")
    assert texts(whole) == [""]
    assert texts(TextSource(name="x", paths=(str(path),), separator="--")) == []


def test_text_reports_bytes_that_are_not_utf8_and_pieces_that_are_huge(tmp_path):
    path = tmp_path / "a.txt"
    # 3 MB without a separator, which then lies across the border of two chunks
    path.write_bytes(b"ok\n==\n\xff\n==\n" + b"x\n" * (3 * CHUNK_BYTES // 2) + b"\n==\nlast")
    records = read(TextSource(name="x", paths=(str(path),), separator="\n==\n"), max_chars=100)
    assert [(record.text, record.reason) for record in records] == [
        ("ok", ""),
        (None, "invalid_utf8"),
        (None, "too_long"),
        ("last", ""),
    ]
    assert records[1].detail.startswith(f"{path}:3: invalid UTF-8")
    assert records[2].detail.startswith(f"{path}:5: more than 400 bytes")
    records = read(TextSource(name="x", paths=(str(path),)), max_chars=100)
    assert [record.reason for record in records] == ["too_long"]


def test_separators_across_chunks_are_found(tmp_path):
    path = tmp_path / "a.txt"
    for offset in range(6):
        path.write_bytes(b"a" * (CHUNK_BYTES - offset) + b"\r\n\r\n" + b"b" * 10)
        pieces = texts(TextSource(name="x", paths=(str(path),), separator="\n\n"), max_chars=10**7)
        assert [len(piece) for piece in pieces] == [CHUNK_BYTES - offset, 10]


def test_globs_are_sorted_and_each_file_comes_once(tmp_path, monkeypatch):
    (tmp_path / "sub").mkdir()
    for name in ("b.txt", "a.txt", "sub/c.txt"):
        (tmp_path / name).write_text(name)
    monkeypatch.chdir(tmp_path)
    assert find_files(TextSource(name="x", paths=("b.txt", "**/*.txt"))) == ["b.txt", "a.txt", "sub/c.txt"]
    with pytest.raises(UserError, match=r"source 'x': paths must match at least one file, got '\*.md'"):
        find_files(TextSource(name="x", paths=("a.txt", "*.md")))


def test_identity_follows_the_files_but_not_name_and_budget(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("1")
    one = identify(TextSource(name="x", paths=(str(path),)))
    assert one == identify(TextSource(name="y", paths=(str(path),), max_tokens=5, max_documents=2))
    assert one != identify(TextSource(name="x", paths=(str(path),), separator="-"))
    path.write_text("12")
    assert one != identify(TextSource(name="x", paths=(str(path),)))
    assert identify(JsonSource(name="x", paths=(str(path),))) != identify(
        JsonSource(name="x", paths=(str(path),), conversation=AlpacaFormat())
    )


class Stream:
    """What `datasets.load_dataset(..., streaming=True)` gives, as far as it is used."""

    def __init__(self, examples):
        self.examples = examples

    def skip(self, count):
        return Stream(self.examples[count:])

    def __iter__(self):
        for example in self.examples:
            if isinstance(example, Exception):
                raise example
            yield example


@pytest.fixture
def hub(monkeypatch):
    import datasets

    calls, examples = [], []

    def load_dataset(*arguments, **options):
        calls.append((arguments, options))
        if not examples:
            raise ConnectionError("Couldn't reach the Hub\nsecond line")
        return Stream(examples)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return calls, examples


def test_hub_passes_every_key_and_streams(hub):
    calls, examples = hub
    examples += [{"body": "a"}, {"other": 1}, {"body": 7}, {"body": "b"}]
    source = HubSource(
        name="x", dataset="org/data", subset="en", split="validation", revision="abc", text_field="body"
    )
    assert texts(source) == ["a", None, None, "b"]
    assert calls == [(("org/data", "en"), {"split": "validation", "revision": "abc", "streaming": True})]
    records = read(source, skip=1)
    assert records[0].detail == "org/data:row 2: no field 'body'; it has 'other'"
    assert [record.reason for record in records] == ["missing_text", "wrong_type", ""]


def test_hub_with_conversations_skips_records(hub):
    _, examples = hub
    row = {
        "message_id": "1",
        "parent_id": None,
        "message_tree_id": "1",
        "text": "q",
        "role": "prompter",
        "rank": None,
    }
    examples += [row, row | {"message_id": "2", "parent_id": "1", "text": "a", "role": "assistant"}]
    examples += [
        row | {"message_id": number, "message_tree_id": number, "text": text}
        for number, text in (("3", "r"), ("4", "s"))
    ]
    source = HubSource(name="x", dataset="org/data", conversation=OasstMessagesFormat())
    assert list(map(said, read(source))) == [["q", "a"], ["r"], ["s"]]
    assert list(map(said, read(source, skip=2))) == [["s"]]  # records, which are trees, not rows
    examples[:] = [{"instruction": "q", "output": "a"}, {"instruction": "r", "output": "b"}]
    assert list(
        map(said, read(HubSource(name="x", dataset="org/data", conversation=AlpacaFormat()), skip=1))
    ) == [["r", "b"]]


def test_hub_out_of_reach_is_one_line(hub):
    _, examples = hub
    source = HubSource(name="x", dataset="org/data")
    with pytest.raises(
        UserError,
        match=r"source 'x': cannot read the hub dataset org/data, split 'train': Couldn't reach the Hub; .*--use-cache",
    ):
        read(source)
    examples += [{"text": "a"}, OSError("connection reset")]
    with pytest.raises(UserError, match="connection reset") as caught:
        read(source)
    assert "\n" not in str(caught.value)


def test_hub_with_a_real_dataset_in_a_folder(tmp_path):
    (tmp_path / "data").mkdir()
    pq.write_table(pa.table({"text": ["a", "b", "c"]}), tmp_path / "data" / "train.parquet")
    source = HubSource(name="x", dataset=str(tmp_path / "data"))
    assert texts(source) == ["a", "b", "c"]
    assert texts(source, skip=2) == ["c"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"kind": "text", "name": "a/b", "paths": ["x"]}, r"sources.0 name must be letters, .* got 'a/b'"),
        ({"kind": "text", "name": "x", "paths": []}, "paths must hold at least one path"),
        ({"kind": "text", "name": "x", "paths": ["x"], "separator": ""}, "separator must be null"),
        (
            {"kind": "text", "name": "x", "paths": ["x"], "max_tokens": 0},
            "max_tokens must be at least 1, or null for all, got 0",
        ),
        (
            {"kind": "jsonl", "name": "x", "paths": ["x"], "max_documents": -1},
            "max_documents must be at least 1",
        ),
        ({"kind": "jsonl", "name": "x", "paths": ["x"], "text_field": ""}, "text_field must be a name"),
        ({"kind": "hub", "name": "x", "dataset": ""}, "dataset must be a name"),
        ({"kind": "hub", "name": "x", "dataset": "a/b", "split": ""}, "split must be a name"),
        ({"kind": "json", "name": "x", "paths": []}, "paths must hold at least one path"),
        (
            {
                "kind": "json",
                "name": "x",
                "paths": ["x"],
                "text_field": "a",
                "conversation": {"kind": "alpaca"},
            },
            "text_field must be left out where conversation is given, got 'a'",
        ),
        (
            {"kind": "text", "name": "x", "paths": ["x"], "conversation": {"kind": "alpaca"}},
            "sources.0.conversation unknown key",
        ),
        ({"kind": "python_docs", "name": "x", "packages": []}, "packages must be a list of different names"),
        ({"kind": "python_docs", "name": "x", "packages": ["../x"]}, "packages must be names such as"),
        ({"kind": "csv", "name": "x"}, 'sources.0.kind must be one of "hub", "jsonl", "json", .*, got "csv"'),
    ],
)
def test_impossible_sources_are_refused(source, message):
    with pytest.raises(UserError, match=message):
        from_dict(PrepareConfig, {"sources": [source]})


def test_python_docs_of_a_package_that_is_not_installed():
    with pytest.raises(UserError, match="packages must name installed packages, got 'no_such_package_here'"):
        identify(PythonDocsSource(name="x", packages=("no_such_package_here",)))
