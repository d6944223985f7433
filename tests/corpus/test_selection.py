from collections import Counter

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import JsonlSource, PrepareConfig
from lumi.corpus.counts import SourceCounts
from lumi.corpus.processing import Outcome
from lumi.corpus.report import print_warnings
from lumi.corpus.review import Glimpse, Review
from lumi.corpus.selection import check_not_empty, select, summarize

OUTCOMES = [
    Outcome("a", None, 10, unused=("id",), glimpse=Glimpse(1, 1)),
    Outcome(None, None, reason="malformed_json", detail="f:2: no", unused=("id", "url")),
    Outcome("b", None, 10, glimpse=Glimpse(1, 2)),
    Outcome("c", None, 10, shortened=True, glimpse=Glimpse(1, 3)),
    Outcome("d", None, 10, glimpse=Glimpse(1, 4)),
]


def selected(**budget):
    """The places that are kept, the counts, and how many decisions about duplicates were taken."""
    counts, taken = SourceCounts(name="s", origin=""), []

    def duplicates():
        for reason in ("", "", "near_duplicate", "", ""):
            taken.append(reason)
            yield reason

    source = JsonlSource(name="s", paths=("x",), **budget)
    review = Review()
    read = lambda place: OUTCOMES[place].document
    places = list(select(OUTCOMES, duplicates(), source, 2.0, counts, review, read))
    examples = {reason: [each.text for each in review.examples(reason)] for reason in ("", "near_duplicate")}
    assert {*examples[""]} == {OUTCOMES[place].document for place in places}
    assert examples["near_duplicate"] == ["b"]
    return places, counts, len(taken)


def test_what_is_neither_dropped_nor_a_duplicate_is_kept():
    places, counts, taken = selected()
    assert (places, taken) == ([0, 3, 4], 5)
    assert (counts.read, counts.kept, counts.shortened, counts.num_bytes) == (5, 3, 1, 30)
    assert counts.dropped == Counter(malformed_json=1, near_duplicate=1)
    assert (counts.unused_fields, counts.examples) == (["id", "url"], ["malformed_json: f:2: no"])
    assert not counts.budget_reached


@pytest.mark.parametrize("budget", [{"max_documents": 2}, {"max_tokens": 10}, {"max_tokens": 6}])
def test_nothing_is_counted_or_decided_beyond_the_budget(budget):
    places, counts, taken = selected(**budget)
    assert (places, taken, counts.read, counts.budget_reached) == ([0, 3], 4, 4, True)


def test_the_summary_adds_up_sources_and_warns(capsys):
    sources = [{"kind": "jsonl", "name": name, "paths": ["x"], "max_documents": 9} for name in "ab"]
    config = from_dict(PrepareConfig, {"sources": sources, "bytes_per_token": 2.0})
    _, first, _ = selected()
    manifest = summarize(config, [first, SourceCounts(name="b", origin="")])
    assert (manifest["documents"], manifest["bytes"], manifest["estimated_tokens"]) == (3, 30, 15)
    assert [source["kept"] for source in manifest["sources"]] == [3, 0]
    assert set(manifest["environment"]) == {"python", "ftfy", "rensa", "pyarrow"}
    assert [warning.split(" ended")[0] for warning in manifest["warnings"]] == [
        "source 's'",
        "source 'b': no document is kept of 0 read (it is empty)",
    ]
    print_warnings(manifest)
    assert capsys.readouterr().err.count("lumi: warning: source") == 2
    check_not_empty(manifest)
    with pytest.raises(UserError, match="at least one document that is kept, got none: source 's' ended"):
        check_not_empty(manifest | {"documents": 0})
