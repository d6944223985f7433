import random

import numpy as np
import pyarrow.parquet as pq
import pytest
from task_runs import planned, run_stages, write_files

from lumi.chat.messages import Message
from lumi.config import UserError, from_dict, read_json
from lumi.corpus import PrepareConfig, corpus_writer
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.scale.deciding import ShardPlan, _by_document
from lumi.corpus.scale.sharing import ENTRY


@pytest.mark.parametrize("first_reasoning", [None, 0, 77, 299])
def test_shards_begin_where_the_writer_begins_them(first_reasoning, tmp_path, monkeypatch):
    monkeypatch.setattr(corpus_writer, "ROW_GROUP_BYTES", 900)
    chance, plan = random.Random(0), ShardPlan(3_000)
    with CorpusWriter(tmp_path, 3_000, "conversations") as writer:
        for document in range(300):
            again = first_reasoning is not None and document > first_reasoning and document % 100 == 99
            reasoning = "so" if again or document == first_reasoning else ""
            size = chance.choice((1, 50, 400, 1_000, 4_000))
            writer.add((Message("assistant", "a" * size, reasoning),), "s", size)
            plan.add(document, size, has_reasoning=bool(reasoning))
        counts = [pq.read_metadata(writer.building / each["file"]).num_rows for each in writer.finish()]
    begins = [shard["first"] for shard in plan.shards]
    assert begins == np.cumsum([0, *counts[:-1]]).tolist()
    flags = [shard["with_reasoning"] for shard in plan.shards]
    assert flags == [first_reasoning is not None and begin >= first_reasoning for begin in begins]


def test_keys_by_document():
    rows = [np.array(entries, ENTRY) for entries in ([(5, 1), (8, 2)], [], [(5, 3), (6, 4)])]
    assert [keys.tolist() for keys in _by_document(rows, 4, 5)] == [[], [1, 3], [4], [], [2]]
    assert [keys.tolist() for keys in _by_document([], 4, 2)] == [[], []]
    assert _by_document([row[:0] for row in rows], 4, 0) == []


def test_numbers_of_documents_count_those_that_passed_the_filters(tmp_path):
    good = [f"A page of {number} words. " * 9 for number in ("one", "two", "three")]
    texts = [{"text": text} for text in ("short", good[0], "", good[1], good[0], good[2])]
    source = {"kind": "jsonl", "name": "a", "paths": write_files(tmp_path, "a", texts, 2)}
    filters = {
        "min_chars": 50,
        "max_duplicate_ngram_char_fraction": None,
        "max_top_ngram_char_fraction": None,
    }
    config = from_dict(PrepareConfig, {"sources": [source], "filters": filters})
    work = planned(config, tmp_path / "c")
    run_stages(work, 1, ["read", "share", "decide"])
    assert np.load(work.decisions / "kept.npy").tolist() == [True, True, False, True]
    assert read_json(work.decisions / "shards.json") == [{"first": 0, "with_reasoning": False}]
    (counts,) = read_json(work.decisions / "manifest.json")["sources"]
    assert (counts["read"], counts["kept"]) == (8, 3)


def test_no_document_at_all_is_an_error(tmp_path):
    source = {"kind": "jsonl", "name": "a", "paths": write_files(tmp_path, "a", [{"text": "x"}], 1)}
    work = planned(from_dict(PrepareConfig, {"sources": [source]}), tmp_path / "c")
    with pytest.raises(UserError, match="sources must give at least one document that is kept, got none"):
        run_stages(work, 1)
    assert not work.decisions.exists()
