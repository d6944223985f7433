import json

from lumi.corpus.counts import (
    MOST_LICENSES,
    NUM_EXAMPLES,
    OTHER_LICENSES,
    SHARES_TEXT_WITH,
    SourceCounts,
    from_manifest,
    in_order,
)


def counted():
    counts = SourceCounts(name="x", origin="text: a.txt", facts={"sha256": "ab", "documents": 9})
    counts.keep(10, shortened=False)
    counts.drop("near_duplicate", "")
    counts.note_unused(["url", "id"])
    counts.note_unused(["id", "lang"])
    counts.keep(32, shortened=True)
    for number in range(NUM_EXAMPLES + 2):
        counts.drop("malformed_json", f"a.txt:{number}")
    return counts


def test_licences_and_details_of_what_is_kept():
    counts = SourceCounts(name="x", origin="")
    for license in ("mit", "", "cc0", "cc0"):
        counts.keep(1, shortened=False, license=license, replaced={"email": 2, "ip": 0})
    entry = counts.to_json(4.0)
    assert list(entry["licenses"].items()) == [("cc0", 2), ("", 1), ("mit", 1)]
    assert entry["replaced"] == {"email": 8}
    assert from_manifest({"sources": [entry]}) == [counts]
    for number in range(2 * MOST_LICENSES):
        counts.keep(1, shortened=False, license=f"text {number}")
    assert len(counts.licenses) == MOST_LICENSES + 1
    assert counts.licenses.total() == counts.kept
    assert counts.licenses[OTHER_LICENSES] == MOST_LICENSES + 3


def test_every_record_is_counted_once_and_the_first_malformed_ones_are_kept():
    counts = counted()
    assert (counts.read, counts.kept, counts.shortened, counts.num_bytes) == (NUM_EXAMPLES + 5, 2, 1, 42)
    assert counts.read == counts.kept + counts.dropped.total()
    assert counts.examples == [f"malformed_json: a.txt:{number}" for number in range(NUM_EXAMPLES)]
    assert counts.estimate_tokens(4.0) == 10  # 42 / 4, rounded half to even


def test_the_entry_of_the_manifest_names_reasons_in_the_order_in_which_they_are_met():
    entry = counted().to_json(4.0)
    assert list(entry["dropped"].items()) == [("malformed_json", NUM_EXAMPLES + 2), ("near_duplicate", 1)]
    assert entry["unused_fields"] == ["url", "id", "lang"]
    assert (entry["bytes"], entry["estimated_tokens"], entry["sha256"]) == (42, 10, "ab")


def test_counts_come_back_from_the_manifest():
    entries = json.loads(json.dumps([counted().to_json(4.0)]))
    assert from_manifest({"sources": entries}) == [counted()]
    assert entries[0]["bytes"] == 42  # the manifest is left as it was


def test_reasons_with_a_name_from_the_data_have_their_place_among_the_others():
    reasons = [
        "near_duplicate",
        "no_place_for_tool_calls",
        "unknown_role",
        "no_place_for_part_x",
        "null_content",
    ]
    assert in_order(reasons) == [reasons[4], reasons[3], reasons[1], reasons[2], reasons[0]]
    shared = [f"{SHARES_TEXT_WITH}{name}" for name in ("arc", "boolq")]
    assert in_order(["exact_duplicate", *reversed(shared), "language"]) == [
        "language",
        *shared,
        "exact_duplicate",
    ]
