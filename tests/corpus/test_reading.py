import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumi.config import UserError
from lumi.corpus import CsvSource, HubSource, JsonlSource, JsonSource, ParquetSource
from lumi.corpus.conversations import AlpacaFormat, MessagesFormat, PromptResponseFormat
from lumi.corpus.oasst import OasstMessagesFormat
from lumi.corpus.reading import open_source


def read(source, max_chars=1000, skip=0):
    return list(open_source(source, max_chars, skip).records)


def texts(source, **options):
    return [record.document for record in read(source, **options)]


def jsonl(tmp_path, *lines, **fields):
    path = tmp_path / "data.jsonl"
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines))
    return JsonlSource(name="x", paths=(str(path),), **fields)


def said(record):
    return [message.content for message in record.document]


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
    assert [(record.document, record.reason) for record in records] == [
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
    assert records[1].detail.startswith(f"{path}:2: not valid JSON: Expecting value")
    assert records[2].detail == f"{path}:4: invalid UTF-8 at byte 10 of the line"
    assert records[4].detail == f"{path}:6: no field 'text'; it has 'id'"
    assert records[5].detail == f"{path}:7: 'text' must be a string, got int"


def test_jsonl_text_field_skip_bom_and_gzip(tmp_path):
    path = tmp_path / "data.jsonl.gz"
    path.write_bytes(gzip.compress(b'\xef\xbb\xbf{"body": "a"}\n{"body": "b"}\n{"body": "c"}'))
    source = JsonlSource(name="x", paths=(str(path),), text_field="body")
    assert texts(source) == ["a", "b", "c"]
    assert texts(source, skip=2) == ["c"]
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UserError, match=r"source 'x': .*data.jsonl.gz must be a readable jsonl file"):
        read(source)


def test_a_field_that_nobody_reads_is_named_with_the_first_record_that_has_it(tmp_path):
    lines = [
        '{"text": "a", "url": "", "n": 0}',
        '{"text": "b", "url": "u", "n": 1}',
        '{"id": 3}',
        '{"id": 4}',
    ]
    assert [record.unused for record in read(jsonl(tmp_path, *lines))] == [("n",), ("url",), ("id",), ()]
    lines = ['{"instruction": "q", "output": "a", "text": "b"}', '{"output": "a", "text": "b", "id": 1}']
    records = read(jsonl(tmp_path, *lines, conversation=AlpacaFormat()))
    assert [record.unused for record in records] == [("text",), ("id",)]


def test_fields_of_trees_that_nobody_reads_are_named(tmp_path):
    row = {"message_id": "a", "parent_id": None, "message_tree_id": "t", "text": "q", "role": "prompter"}
    answer = row | {"message_id": "b", "parent_id": "a", "text": "a", "role": "assistant", "labels": {"x": 1}}
    lines = [json.dumps(row | {"emojis": None, "user_id": "u"}), json.dumps(answer)]
    (record,) = read(jsonl(tmp_path, *lines, conversation=OasstMessagesFormat()))
    assert said(record) == ["q", "a"]
    assert record.unused == ("user_id", "labels")


def test_parquet(tmp_path):
    path = tmp_path / "data.parquet"
    values = pa.array([b"one", None, b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"body": values, "n": [1, 2, 3]}), path)
    records = read(ParquetSource(name="x", paths=(str(path),), text_field="body"))
    assert [(record.document, record.reason) for record in records] == [
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


LABELLED = [
    {"text": "a", "score": 3, "license": "mit", "url": "https://a"},
    {"text": "b", "score": "2.5", "license": ["mit", " cc0 "], "url": None},
    {"text": "c", "score": 1.9},
    {"text": "d", "score": True},
    {"text": "e", "score": "nan"},
    {"text": "f", "score": 9, "license": 5},
]
OPTIONS = {"score_field": "score", "min_score": 2.5, "license_field": "license", "url_field": "url"}


def test_scores_licences_and_addresses(tmp_path):
    source = jsonl(tmp_path, *map(json.dumps, LABELLED), **OPTIONS)
    records = read(source)
    assert [(record.document, record.reason) for record in records] == [
        ("a", ""),
        ("b", ""),
        ("c", "low_score"),
        (None, "no_score"),
        (None, "no_score"),
        (None, "wrong_type"),
    ]
    assert [record.attribution for record in records[:3]] == [
        ("mit", "https://a"),
        ("mit, cc0", ""),
        ("", ""),
    ]
    assert {record.unused for record in records} == {()}
    assert records[3].detail.endswith(":4: 'score' must be a number, got True")
    (plain, *_) = read(jsonl(tmp_path, *map(json.dumps, LABELLED)))
    assert (plain.attribution, plain.unused) == ((None, None), ("score", "license", "url"))


def test_scores_licences_and_addresses_of_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"id": 1, **row, "score": float(row["score"]), "license": "mit"} for row in LABELLED[:3]]
    pq.write_table(pa.Table.from_pylist(rows), path)
    records = read(ParquetSource(name="x", paths=(str(path),), **OPTIONS))
    assert [(record.document, record.reason) for record in records] == [
        ("a", ""),
        ("b", ""),
        ("c", "low_score"),
    ]
    assert [record.attribution for record in records] == [("mit", "https://a"), ("mit", ""), ("mit", "")]
    assert records[0].unused == ("id",)
    with pytest.raises(UserError, match=r"score_field must be a column of .*, got 'quality'"):
        read(ParquetSource(name="x", paths=(str(path),), score_field="quality", min_score=1))
    with pytest.raises(UserError, match=r"column 'score' of .* must hold strings"):
        read(ParquetSource(name="x", paths=(str(path),), text_field="score", url_field="url"))


def test_csv_records(tmp_path):
    path = tmp_path / "a.csv"
    path.write_text("prompt,response,score,note\nWhy?,So.,4,x\nWho?,Me.,1,\n")
    format = PromptResponseFormat()
    source = CsvSource(name="x", paths=(str(path),), conversation=format, score_field="score", min_score=2)
    kept, dropped = read(source)
    assert (said(kept), kept.unused, dropped.reason) == (["Why?", "So."], ("note",), "low_score")


def test_a_sample_depends_on_the_documents_alone(tmp_path):
    lines = [json.dumps({"text": f"document {number}"}) for number in range(2_000)] + ["{"]
    source = jsonl(tmp_path, *lines, sample_fraction=0.25)
    sample = {record.document for record in read(source) if not record.reason}
    assert 425 < len(sample) < 575  # four standard deviations around 500
    again = [
        record for record in read(jsonl(tmp_path, *lines[::-1], sample_fraction=0.25)) if not record.reason
    ]
    assert {record.document for record in again} == sample
    larger = {
        record.document for record in read(jsonl(tmp_path, *lines, sample_fraction=0.5)) if not record.reason
    }
    assert sample < larger
    reasons = [record.reason for record in read(source, skip=1_000)]
    assert set(reasons[:-1]) == {"", "not_sampled"}
    assert (len(reasons), reasons[-1]) == (1_001, "malformed_json")
    assert len(read(jsonl(tmp_path, '{"text": "\\ud800"}', sample_fraction=1.0))) == 1


def test_json_is_one_array(tmp_path):
    path = tmp_path / "data.json.gz"
    data = [{"text": "a"}, {"text": None}, 7, {"text": "ü"}]
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + json.dumps(data, ensure_ascii=False).encode()))
    records = read(JsonSource(name="x", paths=(str(path),)))
    assert [(record.document, record.reason) for record in records] == [
        ("a", ""),
        (None, "missing_text"),
        (None, "malformed_json"),
        ("ü", ""),
    ]
    assert records[2].detail == f"{path}:item 3: must be an object, got int"
    assert texts(JsonSource(name="x", paths=(str(path),)), skip=3) == ["ü"]


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
        match=r"^source 'x': hub: org/data / train cannot be read: Couldn't reach the Hub; .*--use-cache",
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
