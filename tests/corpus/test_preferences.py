import json

import pytest

from lumi.chat.messages import MalformedConversation, Message, to_json
from lumi.chat.pairs import Pair
from lumi.config import from_dict
from lumi.corpus import PrepareConfig, prepare, read_corpus
from lumi.corpus.preferences import PreferenceFormat

SYSTEM = Message("system", "Be brief.")
ASK, GOOD, BAD = Message("user", "Why?"), Message("assistant", "Because."), Message("assistant", "Go away.")
PAIR = Pair((ASK,), (GOOD,), (BAD,))
ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def plain(*messages):
    return to_json(messages)


def sharegpt(*messages):
    return [{"from": ROLES[message.role], "value": message.content} for message in messages]


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "Why?", "chosen": "Because.", "rejected": "Go away."}, PAIR),
        ({"prompt": plain(ASK), "chosen": plain(GOOD), "rejected": plain(BAD)}, PAIR),
        (
            {"prompt": plain(SYSTEM, ASK), "chosen": "Because.", "rejected": plain(BAD)[0]},
            Pair((SYSTEM, ASK), *PAIR[1:]),
        ),
        ({"prompt": sharegpt(ASK), "chosen": sharegpt(GOOD)[0], "rejected": sharegpt(BAD)[0]}, PAIR),
        ({"chosen": plain(ASK, GOOD), "rejected": plain(ASK, BAD)}, PAIR),
        ({"prompt": None, "chosen": sharegpt(ASK, GOOD), "rejected": sharegpt(ASK, BAD)}, PAIR),
        ({"prompt": "Why?", "chosen": plain(ASK, GOOD), "rejected": plain(ASK, BAD)}, PAIR),
        (
            {"chosen": plain(ASK, GOOD, ASK, GOOD), "rejected": plain(ASK, GOOD, ASK, BAD)},
            Pair((ASK, GOOD, ASK), (GOOD,), (BAD,)),
        ),
    ],
    ids="texts messages mixed sharegpt implicit implicit-sharegpt both turns".split(),
)
def test_shapes_of_a_record(record, expected):
    assert PreferenceFormat().read(record) == expected


def test_fields_of_other_names():
    names = PreferenceFormat(prompt_field="question", chosen_field="a", rejected_field="b", system_field="s")
    assert names.required == ("a", "b")
    assert names.optional[:4] == ("question", "history", "s", "tools")
    record = {"question": "Why?", "a": "Because.", "b": "Go away.", "s": "Be brief."}
    assert names.read(record) == Pair((SYSTEM, ASK), *PAIR[1:])
    assert names.read(record | {"s": " "}) == names.read(record | {"s": None}) == PAIR
    whole = {"a": plain(ASK, GOOD), "b": plain(ASK, BAD), "s": "Be brief."}
    assert names.read(whole) == Pair((SYSTEM, ASK), *PAIR[1:])
    with pytest.raises(ValueError, match="must be different names, got prompt, x, x"):
        PreferenceFormat(chosen_field="x", rejected_field="x")


THOUGHT = Message("assistant", "Because.", "They ask why.")
EARLIER = (Message("user", "Hm?"), Message("assistant", "Ask."))


def test_reasoning_belongs_to_its_answer():
    record = {"prompt": "Why?", "chosen": plain(THOUGHT), "rejected": plain(GOOD)}
    assert PreferenceFormat().read(record) == Pair((ASK,), (THOUGHT,), (GOOD,))
    one = [{"from": "gpt", "value": "Because.", "thinking": "They ask why."}]
    assert PreferenceFormat().read(record | {"chosen": one}) == Pair((ASK,), (THOUGHT,), (GOOD,))
    whole = {"chosen": plain(*EARLIER, ASK, THOUGHT), "rejected": plain(*EARLIER, ASK, GOOD)}
    assert PreferenceFormat().read(whole) == Pair((*EARLIER, ASK), (THOUGHT,), (GOOD,))


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "Go away."},
        {"chosen": plain(ASK, GOOD), "rejected": plain(ASK, BAD)},
    ],
    ids=["texts", "implicit"],
)
def test_the_system_message_and_the_history_stand_before_the_prompt(record):
    more = {"system": "Be brief.", "history": [["Hm?", "Ask."]]}
    expected = Pair((SYSTEM, *EARLIER, ASK), (GOOD,), (BAD,))
    assert PreferenceFormat().read(record | more) == expected
    assert PreferenceFormat().unused(record | more) == []
    assert PreferenceFormat(system_field="s").read(record | {"s": "Be brief.", "history": [["Hm?", "Ask."]]})


def test_one_system_message():
    record = {"prompt": plain(SYSTEM, ASK), "chosen": "Because.", "rejected": "Go away."}
    expected = Pair((SYSTEM, ASK), (GOOD,), (BAD,))
    for name in (None, "s"):
        format = PreferenceFormat(system_field=name)
        assert format.read(record | {name or "system": "Be brief."}) == expected
        with pytest.raises(
            MalformedConversation, match=f"field '{name or 'system'}' and message 1"
        ) as caught:
            format.read(record | {name or "system": "Be long."})
        assert caught.value.reason == "two_system_messages"


def test_a_prompt_may_stand_in_a_field_named_history():
    record = {"history": "Why?", "chosen": "Because.", "rejected": "Go away."}
    assert PreferenceFormat(prompt_field="history").read(record) == PAIR


def test_fields_that_nobody_reads_are_named():
    message = plain(BAD)[0] | {"id": 3, "name": ""}
    turn = {"from": "human", "value": "Why?", "mood": "x"}
    record = pair([turn], "Because.", message) | {"score_chosen": 0.5, "note": None}
    assert PreferenceFormat().read(record) == PAIR
    assert PreferenceFormat().unused(record) == ["score_chosen", "prompt[].mood", "rejected[].id"]


WHOLE_GOOD, WHOLE_BAD = plain(ASK, GOOD), plain(ASK, BAD)
TOOL = [{"role": "tool", "content": "x"}]


BAD_RECORDS = [
    ({"prompt": "Why?", "chosen": "x"}, "missing_text", "no field 'rejected'; it has 'prompt', 'chosen'"),
    (pair("Why?", None, "No."), "missing_text", "no field 'chosen'"),
    ({"chosen": "Because.", "rejected": "No."}, "missing_text", "no field 'prompt'"),
    (
        pair("Why?", 5, "No."),
        "wrong_type",
        "'chosen' must be a text, a message or a list of messages",
    ),
    (pair("Why?", ["x"], "No."), "malformed_messages", "message 1 must have a role"),
    (pair([], "x", "No."), "malformed_messages", "a list of at least one message"),
    (pair("Why?", TOOL, "No."), "no_place_for_role_tool", "'tool'"),
    (pair("Why?", "x", [plain(BAD)[0] | {"tool_calls": [1]}]), "no_place_for_tool_calls", "message 1 has"),
    (
        pair("Why?", [plain(GOOD)[0] | {"weight": 0}], "x"),
        "no_place_for_weight",
        "message 1 has the weight 0",
    ),
    (pair("Why?", "x", "No.") | {"tools": [{"name": "f"}]}, "no_place_for_tools", "the record has tools"),
    (pair("Why?", [{"from": "gpt", "value": None}], "x"), "null_content", "message 1"),
    (pair([{"role": "moon", "content": ""}], "x", "y"), "unknown_role", "'moon'"),
    (pair("Why?", "Same.", "Same."), "equal_answers", "^$"),
    (pair(None, WHOLE_GOOD, plain(SYSTEM, ASK, BAD)), "different_prompts", "before an answer"),
    (pair(None, WHOLE_GOOD, plain(ASK, GOOD, ASK)), "different_prompts", "before an answer"),
    (pair("Who?", WHOLE_GOOD, WHOLE_BAD), "different_prompts", "not what both begin with"),
    (pair("Why?", WHOLE_GOOD, "No."), "different_prompts", "before an answer"),
]


@pytest.mark.parametrize(("record", "reason", "detail"), BAD_RECORDS)
def test_bad_records(record, reason, detail):
    with pytest.raises(MalformedConversation, match=detail) as caught:
        PreferenceFormat().read(record)
    assert caught.value.reason == reason


def config(path, **more):
    source = {"kind": "jsonl", "name": "pairs", "paths": [str(path)], "conversation": {"kind": "preference"}}
    return from_dict(PrepareConfig, {"sources": [source], **more})


LONG = " ".join(f"word{index}" for index in range(30))
RECORDS = [
    *(record for record, _, _ in BAD_RECORDS),
    pair("Why?", " Because.\r\n", "Go away."),
    pair("Why?", " Because.\n", "Go away."),  # the first one again when it is clean
    pair("why?", "Because.", "go  away."),  # and again, but for case and white space
    pair("Why?", "Go away.", "Because."),  # the other way round: another pair
    pair("", "x", "y"),
    pair("q", "", "y"),
    pair("q", "y", "\n"),
    pair("q", "x \n", "x"),  # equal when they are clean
    pair([{"role": "assistant", "content": "I begin"}], "x", "y"),
    pair("q", "As an AI language model, no.", "y"),
    pair("q", "y", "As an AI language model, no."),  # a bad answer may be one
    pair(LONG, "One answer.", "Another answer."),
    pair(LONG, "A third answer.", "A fourth answer."),
    {"chosen": plain(SYSTEM, ASK, GOOD, ASK), "rejected": plain(SYSTEM, ASK, BAD)},
    pair("Why?", plain(THOUGHT), "Go away.") | {"score": 5},
    pair("Why?", plain(THOUGHT._replace(reasoning="Hm.\x00")), "Go away.") | {"score": 6, "id": 7},
]


def test_prepare_counts_and_keeps(tmp_path, capsys):
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    rules = {"deduplication": {"normalized": True}}
    manifest = prepare(config(path, **rules), tmp_path / "corpus", num_workers=1)
    (source,) = manifest["sources"]
    assert source["dropped"] == {
        "missing_text": 3,
        "wrong_type": 1,
        "malformed_messages": 2,
        "null_content": 1,
        "no_place_for_role_tool": 1,
        "no_place_for_tool_calls": 1,
        "no_place_for_tools": 1,
        "no_place_for_weight": 1,
        "unknown_role": 1,
        "different_prompts": 4,
        "equal_answers": 2,
        "roles_do_not_alternate": 1,
        "empty_turn": 3,
        "blocked_phrase": 1,
        "exact_duplicate": 1,
        "normalized_duplicate": 1,
    }
    assert source["unused_fields"] == ["score", "id"]
    reader = read_corpus(tmp_path / "corpus")
    assert reader.holds == "pairs"
    assert reader.manifest["columns"] == ["prompt", "chosen", "rejected", "source"]
    pairs = [document for documents, _ in reader.iter_documents() for document in documents]
    assert len(pairs) == len(reader) == source["kept"] == 8
    answers = [each.chosen[0].content for each in pairs]
    long = ["One answer.", "A third answer."]
    assert answers == [" Because.\n", "Go away.", "y", *long, "Because.", "Because.", "Because."]
    assert pairs[5] == Pair((SYSTEM, ASK), (GOOD,), (BAD,))
    assert [each.chosen[0].reasoning for each in pairs[5:]] == ["", "They ask why.", "Hm."]
    assert source["shortened"] == 1
    assert next(reader.iter_texts()) == "Why?\n Because.\n\nGo away."
    printed = capsys.readouterr().out
    assert "pairs read" in printed
    assert "8 pairs in 2 shards" in printed  # the first reasoning begins one
    assert "pairs: fields that are not used: score, id" in printed


def test_the_cache_gives_the_same(tmp_path):
    path = tmp_path / "raw.jsonl"
    path.write_text("\n".join(map(json.dumps, RECORDS)))
    first = prepare(config(path), tmp_path / "corpus", num_workers=1)
    again = prepare(config(path, shard_bytes=2048), tmp_path / "corpus", use_cache=True, num_workers=1)
    assert (again["shards"], again["sources"]) == (first["shards"], first["sources"])


def test_pairs_and_conversations_are_two_corpora(tmp_path):
    one = {"kind": "jsonl", "name": "a", "paths": ["x"], "conversation": {"kind": "preference"}}
    other = one | {"name": "b", "conversation": {"kind": "messages"}}
    with pytest.raises(
        ValueError, match="got pairs from a and conversations from b; prepare a corpus of each"
    ):
        from_dict(PrepareConfig, {"sources": [one, other]})


def test_the_hub_reads_the_shards(tmp_path):
    from corpora import write_pairs
    from datasets import load_dataset

    (tmp_path / "c").mkdir()
    write_pairs(tmp_path / "c", [PAIR])
    (shard,) = (tmp_path / "c").glob("shard-*.parquet")
    (row,) = load_dataset("parquet", data_files=str(shard), split="train", streaming=True)
    assert row == {"prompt": plain(ASK), "chosen": plain(GOOD), "rejected": plain(BAD), "source": "pairs"}
