import dataclasses
import json

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import PrepareConfig, processing
from lumi.corpus.counts import SourceCounts
from lumi.corpus.source_outcomes import open_cache, process_source, source_key, source_keys
from lumi.host.workers import Workers

TEXTS = [f"Text number {number}, with words enough." for number in range(10)]


@pytest.fixture
def config(tmp_path, monkeypatch):
    monkeypatch.setattr(processing, "BATCH_DOCUMENTS", 4)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    source = {"kind": "jsonl", "name": "a", "paths": [str(tmp_path / "a.jsonl")]}
    return from_dict(PrepareConfig, {"sources": [source], "filters": {"min_chars": 9}})


def batches(config, cache, process=processing.process_batch):
    workers, counts = Workers(process, config.rules, 1), SourceCounts(name="a", origin="")
    for outcomes in process_source(config.sources[0], 1000, cache, workers, counts):
        yield [outcome.document for outcome in outcomes]


def test_what_is_in_the_cache_is_not_made_again(config, tmp_path):
    key = source_key(config.sources[0], config)
    expected = [TEXTS[:4], TEXTS[4:8], TEXTS[8:]]
    assert list(batches(config, None)) == expected
    first = batches(config, open_cache(tmp_path, config.sources[0], key, writable=True))
    assert next(first) == expected[0]
    first.close()
    made = []

    def process(rules, records):
        made.append(len(records))
        return processing.process_batch(rules, records)

    for _ in range(2):
        cache = open_cache(tmp_path, config.sources[0], key, writable=True)
        assert list(batches(config, cache, process)) == expected
    assert made == [4, 2]
    assert cache.folder == tmp_path / ".cache" / f"a-{key}"


def test_the_key_holds_all_that_decides_outcomes_and_nothing_else(config, tmp_path):
    (source,) = config.sources
    key = source_keys(config)["a"]
    near = dataclasses.replace(config.deduplication, threshold=0.5)
    assert source_key(source, dataclasses.replace(config, deduplication=near)) == key
    assert source_key(dataclasses.replace(source, max_documents=3), config) == key
    words = dataclasses.replace(config.deduplication, shingle_words=3)
    assert source_key(source, dataclasses.replace(config, deduplication=words)) != key
    (tmp_path / "a.jsonl").write_text("{}\n")
    assert source_key(source, config) != key


def test_an_unknown_language_is_refused_before_any_work(config):
    filters = dataclasses.replace(config.filters, languages=("xx",))
    with pytest.raises(UserError, match="languages must be "):
        source_keys(dataclasses.replace(config, filters=filters))
