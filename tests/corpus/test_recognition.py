"""Which format chat data is in, and where it lies."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lumi.config import UserError
from lumi.corpus.recognition import find_source, recognise
from lumi.corpus.sources import HubSource, JsonlSource, JsonSource, ParquetSource

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SHAREGPT = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
FORMATS = [
    ({"messages": TURNS}, {"kind": "messages", "field": "messages"}),
    ({"conversations": TURNS}, {"kind": "messages", "field": "conversations"}),
    ({"conversations": SHAREGPT}, {"kind": "sharegpt", "field": "conversations"}),
    ({"instruction": "q", "input": "", "output": "a"}, {"kind": "alpaca"}),
    ({"instruction": "q", "context": "c", "response": "a"}, {"kind": "dolly"}),
    ({"prompt": "q", "response": "a"}, {"kind": "prompt_response", "response_field": "response"}),
    ({"prompt": "q", "completion": "a"}, {"kind": "prompt_response", "response_field": "completion"}),
    ({"question": "q", "answer": "a"}, {"kind": "prompt_response", "prompt_field": "question"}),
    ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"kind": "preference", "prompt_field": "prompt"}),
    ({"question": "q", "chosen": "a", "rejected": "b"}, {"kind": "preference", "prompt_field": "question"}),
    (
        {"conversations": SHAREGPT[:1], "chosen": SHAREGPT[1], "rejected": {"from": "gpt", "value": "b"}},
        {"kind": "preference", "prompt_field": "conversations"},
    ),
]


def write(path, records):
    path.write_text("\n".join(map(json.dumps, records)))
    return str(path)


@pytest.mark.parametrize(("record", "expected"), FORMATS, ids=lambda value: str(value)[:40])
def test_formats(tmp_path, record, expected):
    found = recognise(find_source([write(tmp_path / "data.jsonl", [record] * 3)]))
    assert {key: getattr(found.format, key) for key in expected} == expected
    assert (found.num_read, found.num_records) == (3, 3)


def test_broken_records_are_counted_and_too_many_are_refused(tmp_path):
    good, bad = {"messages": TURNS}, {"messages": "x"}
    found = recognise(find_source([write(tmp_path / "some.jsonl", [bad, good, good])]))
    assert (found.num_read, found.num_records) == (2, 3)
    assert found.example[0].content == "q"
    with pytest.raises(
        UserError, match=r"must hold conversations or pairs .*, got the fields messages; rename"
    ):
        recognise(find_source([write(tmp_path / "most.jsonl", [bad, bad, bad, good])]))


def test_where_data_lies(tmp_path):
    lines, array = tmp_path / "a.jsonl", tmp_path / "b.json"
    write(lines, [{"messages": TURNS}])
    array.write_text("\ufeff \n" + json.dumps([{"messages": TURNS}]))
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(lines.read_bytes()))
    table = tmp_path / "d.parquet"
    pq.write_table(pa.Table.from_pylist([{"messages": TURNS}]), table)
    kinds = {lines: JsonlSource, array: JsonSource, packed: JsonlSource, table: ParquetSource}
    for path, kind in kinds.items():
        source = find_source([str(path)])
        assert type(source) is kind
        assert recognise(source).num_read == 1
    assert find_source(["org/name"], "sft") == HubSource(name="data", dataset="org/name", split="sft")
    table.write_bytes(b"no")
    with pytest.raises(UserError, match=r"d\.parquet: must be a Parquet file"):
        recognise(find_source([str(table)]))
