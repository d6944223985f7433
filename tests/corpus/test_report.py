from collections import Counter
from dataclasses import replace

from lumi.corpus.counts import SourceCounts
from lumi.corpus.report import data_card, find_warnings, summary_table, unused_fields

FIRST = SourceCounts(
    name="first", origin="jsonl: a", read=1200, kept=1000, num_bytes=4_000_000, dropped=Counter(too_long=200)
)
SECOND = SourceCounts(
    name="second",
    origin="text: b",
    read=7,
    kept=4,
    shortened=2,
    num_bytes=30_001,
    dropped=Counter(near_duplicate=1, malformed_json=2),
    examples=["malformed_json: b:3: no"],
    facts={"sha256": "abc"},
)


def manifest(*sources, **values):
    return {
        "sources": [source.to_json(4.0) for source in sources],
        "config": {
            "sources": [{"kind": "jsonl", "conversation": None}, {"kind": "text"}],
            "bytes_per_token": 4.0,
            "cleaning": {"repair_text": True},
            "filters": {"min_chars": 5},
            "conversation_filters": None,
            "decontamination": {"ngram": 13, "min_words": 8},
            "deduplication": {"exact": True},
        },
        "evaluation_sets": [],
        "documents": 1004,
        "bytes": 4_030_001,
        "estimated_tokens": 1_007_500,
        "warnings": [],
        "environment": {"python": "3.11.7"},
    } | values


def test_the_table_has_a_column_for_each_source_and_one_for_all():
    assert summary_table(manifest(FIRST, SECOND)).splitlines() == [
        "                             first  second      total",
        "documents read               1,200       7      1,207",
        "kept                         1,000       4      1,004",
        "kept, but shortened              0       2          2",
        "dropped: malformed_json          0       2          2",
        "dropped: too_long              200       0        200",
        "dropped: near_duplicate          0       1          1",
        "megabytes kept                4.00    0.03       4.03",
        "estimated tokens         1,000,000   7,500  1,007,500",
    ]


def test_the_table_of_one_source_has_no_total():
    assert summary_table(manifest(FIRST)).splitlines() == [
        "                       first",
        "documents read         1,200",
        "kept                   1,000",
        "dropped: too_long        200",
        "megabytes kept          4.00",
        "estimated tokens   1,000,000",
    ]


def test_warnings():
    nothing = SourceCounts(
        name="x",
        origin="",
        read=3,
        dropped=Counter(too_short=1, missing_text=2),
        examples=["missing_text: a:1"],
    )
    (warning,) = find_warnings(nothing, has_budget=False, bytes_per_token=4.0)
    assert warning == (
        "source 'x': no document is kept of 3 read (2 missing_text, 1 too_short);"
        " the first of them: missing_text: a:1"
    )
    empty = SourceCounts(name="x", origin="")
    assert "of 0 read (it is empty)" in find_warnings(empty, has_budget=True, bytes_per_token=4.0)[0]
    (warning,) = find_warnings(FIRST, has_budget=True, bytes_per_token=4.0)
    assert warning == "source 'first' ended before its budget: 1,000,000 estimated tokens"
    assert find_warnings(FIRST, has_budget=False, bytes_per_token=4.0) == []


def test_licences_and_replaced_details():
    source = replace(FIRST, licenses=Counter({"mit|<b>": 990, "": 10}), replaced=Counter(ip=3))
    card = data_card(manifest(source, SECOND))
    assert "| first | mit\\|\\<b> | 990 |\n| first | not given | 10 |\n\n" in card
    assert "## Licences" not in data_card(manifest(FIRST))
    (row,) = [row for row in summary_table(manifest(source, SECOND)).splitlines() if "replaced" in row]
    assert row.split() == ["replaced:", "ip", "3", "0", "3"]


def test_the_data_card():
    card = data_card(manifest(FIRST, SECOND, warnings=["look here"]))
    assert "1,004 documents, 4.03 MB of UTF-8 text, about 1,007,500 tokens (4.0 bytes per token)" in card
    assert "| second | text: b | 4 | 0.03 | 7,500 |" in card
    assert "- look here\n- second: 2 of 4 conversations are kept without what the user said last" in card
    assert "- dropped of second: malformed_json: b:3: no\n- second: SHA-256 of its documents abc\n" in card
    assert "- filters: `min_chars` 5\n- deduplication: `exact` True\n- made with python 3.11.7\n" in card
    assert "## Notes" not in data_card(manifest(FIRST))
    assert "## Decontamination" not in card


def test_the_data_card_counts_what_was_dropped_for_each_evaluation_set():
    first = SourceCounts(name="a", origin="", dropped=Counter(shares_text_with_arc=2, too_long=1))
    second = SourceCounts(name="b", origin="", dropped=Counter(shares_text_with_arc=1))
    sets = [
        {"name": "arc", "origin": "jsonl: arc.jsonl", "records": 1172},
        {"name": "piqa", "origin": "hub: piqa", "records": 9},
    ]
    card = data_card(manifest(first, second, evaluation_sets=sets))
    assert "Documents were dropped that share 13 successive words with a text of these sets" in card
    assert "| arc | jsonl: arc.jsonl | 1,172 | 3 |\n| piqa | hub: piqa | 9 | 0 |\n" in card
    assert "dropped: shares_text_with_arc" in card


def test_unused_fields_are_named_once_for_each_source_and_a_long_list_is_cut():
    first = SourceCounts(name="a", origin="", unused_fields=["url", "messages[].name"])
    many = SourceCounts(name="b", origin="", unused_fields=[f"f{number}" for number in range(1025)])
    lines = unused_fields(manifest(first, SourceCounts(name="none", origin=""), many))
    assert lines[0] == "a: fields that are not used: url, messages[].name"
    assert lines[1].startswith("b: fields that are not used: f0, f1, ")
    assert lines[1].endswith("f19 and 1,005 more")
    assert len(lines) == 2
    assert f"- {lines[0]}\n- {lines[1]}\n" in data_card(manifest(first, many))
