"""Files as they are written; the hub through a stand-in for `datasets`."""

import bz2
import gzip
import json
import lzma
import sys
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumi.config import UserError
from lumi.corpus import CsvSource, HubDataset, JsonFiles, JsonlFiles, ParquetSource, TextFiles, TextSource
from lumi.corpus.conversations import MessagesFormat, PromptResponseFormat
from lumi.corpus.documents import Record
from lumi.corpus.raw_records import CHUNK_BYTES, RawRecord, read_pieces, read_records


def read(location, **options):
    return list(read_pieces(location, **options))


def texts(location, **options):
    return [piece.document for piece in read(location, **options)]


def jsonl(tmp_path, *lines):
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines))
    return JsonlFiles(paths=(str(path),))


def test_fields_are_given_as_they_are_with_their_place(tmp_path):
    location = jsonl(tmp_path, '{"a": [1, null]}', "", "{}", "3")
    path = location.paths[0]
    assert read(location) == [
        RawRecord({"a": [1, None]}, f"{path}:1"),
        RawRecord({}, f"{path}:3"),
        Record(None, "malformed_json", f"{path}:4: must be an object, got int"),
    ]
    assert read(location, skip=1) == read(location)[1:]
    (tmp_path / "data.json").write_text('[{"a": 1}, {}]')
    path = str(tmp_path / "data.json")
    assert read(JsonFiles(paths=(path,)), skip=1) == [RawRecord({}, f"{path}:item 2")]


def test_jsonl_that_is_an_array_hints_at_the_other_kind(tmp_path):
    hint = '; for a file that is one JSON array use kind "json"'
    for lines in (
        ['[{"text": "a"}]'],
        ["[", '{"text": "a"}', "]"],
        ['[{"text": "' + "a" * CHUNK_BYTES * 2 + '"}]'],
    ):
        first, *others = read(jsonl(tmp_path, *lines), max_chars=1000)
        assert first.document is None
        assert first.detail.endswith(hint)
        assert not any(hint in str(piece) for piece in others)
    assert not any(hint in str(piece) for piece in read(jsonl(tmp_path, "{", '["list"]')))


def test_a_line_that_is_huge_is_passed_over_without_being_held(tmp_path):
    huge = {"text": "x" * 3 * CHUNK_BYTES}
    location = jsonl(tmp_path, '{"text": "a"}', json.dumps(huge), '{"text": "b"}')
    first, second, third = read(location, max_chars=10)
    assert (first.fields, third.fields) == ({"text": "a"}, {"text": "b"})
    assert (second.document, second.reason) == (None, "too_long")
    assert f"{location.paths[0]}:2: a line of more than" in second.detail
    assert read(location)[1].fields == huge  # no limit was given


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
    message = rf'data.json must hold one JSON array of objects, got .*{got}.*; .* use kind "jsonl"'
    with pytest.raises(UserError, match=message):
        read(JsonFiles(paths=(str(path),)))


def test_parquet_of_dictionary_and_large_strings(tmp_path):
    columns = [pa.array(["a", "b", "a"]).dictionary_encode(), pa.array(["a", "b", "a"], pa.large_string())]
    for index, column in enumerate(columns):
        path = tmp_path / f"{index}.parquet"
        pq.write_table(pa.table({"text": column}), path)
        assert texts(ParquetSource(name="x", paths=(str(path),))) == ["a", "b", "a"]


def test_the_columns_that_are_not_read_are_named(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(pa.table({"url": ["u"], "text": ["a"], "prompt": ["q"], "response": ["b"]}), path)
    (record,) = read(ParquetSource(name="x", paths=(path,)))
    assert (record.document, record.unused) == ("a", ("url", "prompt", "response"))
    chats = ParquetSource(name="x", paths=(path,), conversation=PromptResponseFormat())
    assert read(chats) == [RawRecord({"prompt": "q", "response": "b"}, f"{path}:row 1", ("url", "text"))]


def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path):
    path = str(tmp_path / "a.parquet")
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"])] * 4, names=["text", "prompt", "text", "response"]), path
    )
    message = r"a.parquet must have columns of different names, got 'text' more than once; rename one"
    with pytest.raises(UserError, match=message):
        read(ParquetSource(name="x", paths=(path,)))
    (piece,) = read(ParquetSource(name="x", paths=(path,), conversation=PromptResponseFormat()))
    assert piece.fields == {"prompt": "a", "response": "a"}


def test_two_fields_of_one_name_within_a_column_are_refused(tmp_path):
    path = str(tmp_path / "a.parquet")
    turns = pa.StructArray.from_arrays([pa.array(["user"])] * 3, names=["role", "content", "content"])
    pq.write_table(pa.table({"messages": pa.ListArray.from_arrays([0, 1], turns)}), path)
    with pytest.raises(UserError, match=r"different names, got 'content' more than once"):
        read(ParquetSource(name="x", paths=(path,), conversation=MessagesFormat()))


def test_a_compressed_parquet_file_is_refused(tmp_path):
    path = tmp_path / "a.parquet.gz"
    path.write_bytes(gzip.compress(b"PAR1"))
    with pytest.raises(UserError, match=r"gz must be a plain Parquet file, got one in gzip; unpack it first"):
        read(ParquetSource(name="x", paths=(str(path),)))


def test_a_name_that_stands_twice_in_an_object_is_malformed(tmp_path):
    (piece,) = read(jsonl(tmp_path, '{"text": "a", "meta": {"b": 1, "b": 2}}'))
    assert (piece.reason, piece.document) == ("malformed_json", None)
    assert piece.detail.endswith("data.jsonl:1: not valid JSON: duplicate key 'b'")


@pytest.mark.parametrize("ending", [".gz", ".bz2", ".xz", ".zst"])
def test_a_glob_of_plain_and_compressed_files_loses_none(tmp_path, ending):
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}.get(
        ending, lambda data: pa.compress(data, codec="zstd", asbytes=True)
    )
    (tmp_path / "a.jsonl").write_text('{"n": 1}')
    whole = compress(b'{"n": 2}\n{"n": 3}')
    path = tmp_path / f"b.jsonl{ending}"
    path.write_bytes(whole)
    location = JsonlFiles(paths=(str(tmp_path / "*.jsonl*"),))
    assert [piece.fields["n"] for piece in read(location)] == [1, 2, 3]
    path.write_bytes(whole[:-4])
    with pytest.raises(UserError, match=rf"b.jsonl{ending} must be a readable jsonl file, got \w"):
        read(location)


def csv_source(tmp_path, data, **options):
    path = tmp_path / "data.csv"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return CsvSource(name="x", paths=(str(path),), **options), str(path)


def test_csv(tmp_path):
    data = b'\xef\xbb\xbftext,id\r\n"a ""quoted"", one\nof two lines",1\r\n\r\n'
    data += b'\xff,2\nb,3,4\n"c"d,5\n,6\n"open,7\n'
    source, path = csv_source(tmp_path, data)
    assert read(source) == [
        RawRecord({"text": 'a "quoted", one\nof two lines', "id": "1"}, f"{path}:3"),
        Record(None, "invalid_utf8", f"{path}:5: invalid UTF-8 in the row that ends here"),
        Record(None, "malformed_csv", f"{path}:6: 3 fields, the header has 2"),
        Record(None, "malformed_csv", f"{path}:7: ',' expected after '\"'"),
        RawRecord({"text": "", "id": "6"}, f"{path}:8"),
        Record(None, "malformed_csv", f"{path}:9: unexpected end of data"),
    ]


def test_csv_with_tabs_compressed(tmp_path):
    source, _ = csv_source(
        tmp_path, gzip.compress(b"body\turl\na, b\tc\n"), text_field="body", delimiter="\t"
    )
    assert [piece.fields for piece in read(source)] == [{"body": "a, b", "url": "c"}]


def test_a_field_of_csv_that_is_huge_is_not_held(tmp_path):
    huge = "x" * (3 * CHUNK_BYTES)
    source, _ = csv_source(tmp_path, f'text\nbefore\n"{huge}"\n{"y" * 50}\nafter\n')
    pieces = read(source, max_chars=100)
    assert (pieces[0].fields, pieces[-1].fields) == ({"text": "before"}, {"text": "after"})
    assert pieces[1].reason == "malformed_csv"
    assert "field larger than field limit" in pieces[1].detail


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("", "must have the columns text, got nothing in its first line"),
        ("body,id\n", "must have the columns text, got body, id in its first line"),
        ("text,id,id\n", "must have columns of different names, got 'id' more than once"),
        ('"text\n', "must begin with the names of its columns, got unexpected end of data"),
    ],
)
def test_a_header_of_csv_that_does_not_fit_is_refused(header, message, tmp_path):
    with pytest.raises(UserError, match=message):
        read(csv_source(tmp_path, header)[0])


def test_text_is_a_document_per_file_or_per_separator(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes("\ufeffone\r\n\r\ntwo\ntwo\r\n\r\n\n\nthree\n".encode())
    whole = TextFiles(paths=(str(path),))
    assert texts(whole) == ["one\r\n\r\ntwo\ntwo\r\n\r\n\n\nthree\n"]
    assert texts(TextSource(name="x", paths=(str(path),), separator="\n\n")) == ["one", "two\ntwo", "three"]
    assert texts(TextSource(name="x", paths=(str(path),), separator="two")) == ["one", "three"]
    windows = TextSource(name="x", paths=(str(path),), separator="\r\n\r\n")
    assert texts(windows) == ["one", "two\ntwo", "three"]
    path.write_bytes(b"")
    assert texts(whole) == [""]
    assert texts(TextSource(name="x", paths=(str(path),), separator="--")) == []


def test_text_reports_bytes_that_are_not_utf8_and_pieces_that_are_huge(tmp_path):
    path = tmp_path / "a.txt"
    # 3 MB without a separator, which then lies across the border of two chunks
    path.write_bytes(b"ok\n==\n\xff\n==\n" + b"x\n" * (3 * CHUNK_BYTES // 2) + b"\n==\nlast")
    pieces = read(TextSource(name="x", paths=(str(path),), separator="\n==\n"), max_chars=100)
    assert [(piece.document, piece.reason) for piece in pieces] == [
        ("ok", ""),
        (None, "invalid_utf8"),
        (None, "too_long"),
        ("last", ""),
    ]
    assert pieces[1].detail.startswith(f"{path}:3: invalid UTF-8")
    assert pieces[2].detail.startswith(f"{path}:5: more than 400 bytes")
    pieces = read(TextFiles(paths=(str(path),)), max_chars=100)
    assert [piece.reason for piece in pieces] == ["too_long"]


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
    assert texts(TextFiles(paths=("b.txt", "**/*.txt"))) == ["b.txt", "a.txt", "sub/c.txt"]
    with pytest.raises(UserError, match=r"^paths must match at least one file, got '\*.md'"):
        read(TextFiles(paths=("a.txt", "*.md")))


def stand_in(monkeypatch, load_dataset):
    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))


def test_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(*arguments, **options):
        asked.append((arguments, options))
        return ({"n": i} for i in range(10**9))

    stand_in(monkeypatch, load_dataset)
    dataset = HubDataset(dataset="allenai/ai2_arc", subset="ARC-Easy", split="test", revision="abc")
    pieces = read_pieces(dataset)
    assert [next(pieces), next(pieces)] == [
        RawRecord({"n": 0}, "allenai/ai2_arc:row 1"),
        RawRecord({"n": 1}, "allenai/ai2_arc:row 2"),
    ]
    assert asked == [
        (("allenai/ai2_arc", "ARC-Easy"), {"split": "test", "revision": "abc", "streaming": True})
    ]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch):
    def load_dataset(*arguments, **options):
        raise ConnectionError("no route\nto host")

    stand_in(monkeypatch, load_dataset)
    message = r"^hub: a/b / validation cannot be read: no route; check its name and your network"
    with pytest.raises(UserError, match=message) as caught:
        read(HubDataset(dataset="a/b"))
    assert "\n" not in str(caught.value)


def test_records_in_order(tmp_path):
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
def test_files_with_a_bad_record(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError) as error:
        read_records(JsonlFiles(paths=("x.jsonl",)))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)


def test_line_ends_of_a_text_become_newlines(tmp_path):
    (tmp_path / "t.txt").write_bytes(b"one\r\ntwo\rthree\n")
    assert read_records(TextFiles(paths=(str(tmp_path / "t.txt"),))) == [{"text": "one\ntwo\nthree\n"}]


def test_records_of_an_array(tmp_path):
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
