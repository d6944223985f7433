import json

import pytest

from lumi.config import from_dict
from lumi.corpus import JsonlSource
from lumi.corpus.reading import open_source


def node(text, role="prompter", *replies, **fields):
    return {"text": text, "role": role, "replies": list(replies), **fields}


# The path of the lowest ranks is q, a0, q1, a1; q0 is better liked than q1, but was deleted.
TREE = node(
    "q",
    "prompter",
    node("a2", "assistant", rank=2),
    node("a-none", "assistant", node("never"), rank=None),
    node(
        "a0",
        "assistant",
        node("q0", "prompter", node("gone", "assistant"), rank=0, deleted=True),
        node("q1", "prompter", node("a1", "assistant"), node("a1-later", "assistant"), rank=1),
        rank=0,
    ),
    lang="en",
)
BEST = ["q", "a0", "q1", "a1"]


def rows_of(tree, tree_id, parent=None):
    """A tree as the hub has it: a row per message, depth first."""
    identity = f"{tree_id}/{tree['text']}"
    row = {
        "message_id": identity,
        "parent_id": parent,
        "message_tree_id": tree_id,
        "rank": None,
        "deleted": False,
        "lang": "en",
    }
    rows = [row | {key: value for key, value in tree.items() if key != "replies"}]
    for reply in tree["replies"]:
        rows += rows_of(reply, tree_id, identity)
    return rows


def read(tmp_path, conversation, records, skip=0):
    path = tmp_path / "trees.jsonl"
    path.write_text(
        "".join((record if isinstance(record, str) else json.dumps(record)) + "\n" for record in records)
    )
    source = from_dict(JsonlSource, {"name": "x", "paths": [str(path)], "conversation": conversation})
    return list(open_source(source, 10_000, skip).records)


def said(record):
    return [message.content for message in record.document]


def test_the_best_ranked_path(tmp_path):
    (record,) = read(tmp_path, {"kind": "oasst"}, [{"prompt": TREE}])
    assert said(record) == BEST
    assert [message.role for message in record.document] == ["user", "assistant"] * 2


def test_the_flat_form_gives_the_same(tmp_path):
    rows = [*rows_of(TREE, "one"), *rows_of(node("only"), "two"), *rows_of(TREE, "three")]
    records = read(tmp_path, {"kind": "oasst_messages"}, rows)
    assert list(map(said, records)) == [BEST, ["only"], BEST]
    assert read(tmp_path, {"kind": "oasst_messages"}, rows, skip=2) == records[2:]
    # A line that is malformed is counted by itself, and does not tear its tree apart.
    records = read(tmp_path, {"kind": "oasst_messages"}, [*rows[:3], "{", "[]", *rows[3:10]])
    assert sorted(record.reason for record in records) == ["", "malformed_json", "malformed_json"]
    assert said(records[-1]) == BEST


def test_the_rows_of_a_tree_may_stand_anywhere(tmp_path):
    rows = rows_of(TREE, "one")
    records = read(
        tmp_path, {"kind": "oasst_messages"}, [*rows[:3], *rows_of(node("only"), "two"), *rows[3:]]
    )
    assert list(map(said, records)) == [BEST, ["only"]]  # the best reply comes behind the other tree
    records = read(tmp_path, {"kind": "oasst_messages"}, [*rows_of(node("only"), "two"), *rows[::-1]])
    assert said(records[0]) == ["only"]
    assert set(said(records[1])) == {"q", "a0", "q1", "a1-later"}  # of equals the first


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda rows: [*rows[:4], *rows[5:]],
            "parent_id must be a message of the same tree, got 'one/a0' in message 'one/q0'",
        ),
        (
            lambda rows: rows[1:],
            "parent_id must be a message of the same tree, got 'one/q' in message 'one/a2'",
        ),
        (lambda rows: [*rows, rows[4]], "message_id must stand once in a tree, got 'one/a0' again"),
        (
            lambda rows: [*rows, rows[0] | {"message_id": "x"}],
            "a tree must have one message without a parent, got 2",
        ),
    ],
)
def test_a_tree_that_is_not_whole_is_counted_and_named(tmp_path, spoil, message):
    (record,) = read(tmp_path, {"kind": "oasst_messages"}, spoil(rows_of(TREE, "one")))
    assert (record.reason, record.detail) == ("malformed_tree", f"{tmp_path}/trees.jsonl:1: {message}")


def test_a_parent_that_is_no_name(tmp_path):
    (record,) = read(
        tmp_path, {"kind": "oasst_messages"}, [rows_of(node("q"), "one")[0] | {"parent_id": ["x"]}]
    )
    assert (record.reason, record.detail) == (
        "wrong_type",
        f"{tmp_path}/trees.jsonl:1: 'parent_id' must be a string, got list",
    )


def test_rows_without_a_tree_are_records_of_their_own(tmp_path):
    records = read(tmp_path, {"kind": "oasst_messages"}, [{"text": "a"}, {"text": "b"}])
    assert [record.reason for record in records] == ["missing_text", "missing_text"]
    row = rows_of(node("q"), "one")[0]
    records = read(
        tmp_path,
        {"kind": "oasst_messages"},
        [row | {"message_tree_id": None}, row | {"message_tree_id": ["one"]}],
    )
    assert [record.reason for record in records] == ["missing_text", "wrong_type"]


@pytest.mark.parametrize("kind", ["oasst", "oasst_messages"])
def test_the_language_that_is_wanted(tmp_path, kind):
    trees = [node("q", lang="de"), node("q", lang="en"), node("q", lang=None)]
    records = (
        [{"prompt": tree} for tree in trees]
        if kind == "oasst"
        else [rows_of(tree, str(i))[0] for i, tree in enumerate(trees)]
    )
    found = read(tmp_path, {"kind": kind, "lang": "de"}, records)
    assert [(record.reason, record.detail) for record in found] == [
        ("", ""),
        ("other_language", ""),
        ("other_language", ""),
    ]
    assert [record.reason for record in read(tmp_path, {"kind": kind}, records)] == ["", "", ""]


@pytest.mark.parametrize(
    ("tree", "reason", "message"),
    [
        (node("q", deleted=True), "deleted", ""),
        (node("q", "bot"), "unknown_role", "role must be one of prompter, assistant, got 'bot'"),
        (node(None), "missing_text", "no field 'text'"),
        (node(3), "wrong_type", "'text' must be a string, got int"),
        ("q", "malformed_tree", "a message must be an object, got str"),
        (node("q", "prompter", "a"), "malformed_tree", "a message must be an object, got str"),
        (
            node("q", "prompter", node("a", "assistant", rank="0")),
            "malformed_tree",
            "rank must be a number, got str",
        ),
        (
            {"text": "q", "role": "prompter", "replies": "x"},
            "malformed_tree",
            "replies must be a list, got str",
        ),
    ],
)
def test_malformed_trees_have_a_reason(tmp_path, tree, reason, message):
    (record,) = read(tmp_path, {"kind": "oasst"}, [{"prompt": tree}])
    assert (record.document, record.reason) == (None, reason)
    assert message in record.detail


def test_a_rank_that_is_not_a_number_comes_last(tmp_path):
    tree = node(
        "q", "prompter", node("a", "assistant", rank=float("nan")), node("b", "assistant", rank=10**400)
    )
    assert said(*read(tmp_path, {"kind": "oasst"}, [{"prompt": tree}])) == ["q", "b"]
