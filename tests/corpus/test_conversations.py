import pytest

from lumi.chat.messages import MalformedConversation
from lumi.config import UserError, from_dict
from lumi.corpus import JsonlSource


def read(conversation, record):
    """What a source with this config makes of a record, as (role, content) pairs."""
    source = from_dict(JsonlSource, {"name": "x", "paths": ["x"], "conversation": conversation})
    return [(message.role, message.content) for message in source.conversation.read(record)]


def unused(conversation, record):
    source = from_dict(JsonlSource, {"name": "x", "paths": ["x"], "conversation": conversation})
    return source.conversation.unused(record)


@pytest.mark.parametrize("input_", [{}, {"input": None}, {"input": ""}, {"input": " \n"}])
def test_alpaca_without_input(input_):
    assert read({"kind": "alpaca"}, {"instruction": "q", "output": "a"} | input_) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_alpaca_with_input_and_system():
    record = {"instruction": "q", "input": "i", "output": "a", "system": "s"}
    assert read({"kind": "alpaca"}, record) == [("system", "s"), ("user", "q\n\ni"), ("assistant", "a")]
    assert read({"kind": "alpaca"}, record | {"system": " "})[0] == ("user", "q\n\ni")


HISTORY = [["q1", "a1"], ["q2", "a2"]]
EARLIER = [("user", "q1"), ("assistant", "a1"), ("user", "q2"), ("assistant", "a2")]


@pytest.mark.parametrize(
    ("conversation", "record"),
    [
        ({"kind": "alpaca"}, {"instruction": "q", "output": "a"}),
        ({"kind": "dolly"}, {"instruction": "q", "response": "a"}),
        ({"kind": "prompt_response"}, {"prompt": "q", "response": "a"}),
    ],
)
def test_the_system_message_and_the_history_stand_before_the_question(conversation, record):
    own = [("user", "q"), ("assistant", "a")]
    assert read(conversation, record | {"history": HISTORY}) == EARLIER + own
    both = record | {"history": HISTORY, "system": "s"}
    assert read(conversation, both) == [("system", "s"), *EARLIER, *own]
    assert unused(conversation, both) == []
    for history in (None, [], "[]", ""):
        assert read(conversation, record | {"history": history, "system": None}) == own
    for history in ("earlier", ["q1", "a1"], [["q1"]], [["q1", None]], {"q1": "a1"}):
        with pytest.raises(MalformedConversation, match="'history' must be a list of") as caught:
            read(conversation, record | {"history": history})
        assert caught.value.reason == "wrong_type"


def test_a_question_may_stand_in_a_field_named_history():
    format = {"kind": "prompt_response", "prompt_field": "history"}
    assert read(format, {"history": "q", "response": "a"}) == [("user", "q"), ("assistant", "a")]


TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]


@pytest.mark.parametrize(
    ("conversation", "field", "turns"),
    [
        ({"kind": "messages"}, "messages", TURNS),
        (
            {"kind": "sharegpt"},
            "conversations",
            [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
        ),
    ],
)
def test_a_system_message_beside_the_messages_stands_first(conversation, field, turns):
    expected = [("system", "s"), ("user", "q"), ("assistant", "a")]
    assert read(conversation, {field: turns, "system": "s", "tools": "[]"}) == expected
    assert read(conversation, {field: turns, "system": " "}) == expected[1:]
    for own in ("s", " s\n", ""):
        first = {"role": "system", "content": own}
        assert read(conversation, {field: [first, *turns], "system": "s"}) == expected
    with pytest.raises(MalformedConversation, match="differ: 'other'") as caught:
        read(conversation, {field: [{"role": "system", "content": "other"}, *turns], "system": "s"})
    assert caught.value.reason == "two_system_messages"


def test_fields_that_nobody_reads_are_named():
    turns = [TURNS[0] | {"name": "x", "weight": 0, "mood": ""}, {"from": "gpt", "value": "a", "id": 3}]
    record = {"messages": turns, "source": "web", "score": 0, "notes": None, "system": "s", "tools": []}
    assert unused({"kind": "messages"}, record) == [
        "source",
        "score",
        *(f"messages[].{name}" for name in ("name", "from", "value", "id")),
    ]
    assert unused({"kind": "sharegpt", "field": "messages"}, record)[2:] == [
        "messages[].name",
        "messages[].id",
    ]
    assert unused({"kind": "dolly"}, {"instruction": "q", "response": "a", "category": "c"}) == ["category"]
    assert unused({"kind": "oasst"}, {"prompt": {}, "id": 3}) == ["id"]


def test_dolly_has_its_context_below_the_instruction():
    record = {"instruction": "q", "context": "c", "response": "a", "category": "closed_qa"}
    assert read({"kind": "dolly"}, record) == [("user", "q\n\nc"), ("assistant", "a")]
    assert read({"kind": "dolly"}, record | {"context": ""}) == [("user", "q"), ("assistant", "a")]


def test_messages():
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read({"kind": "messages"}, {"messages": turns}) == [("user", "q"), ("assistant", "a")]
    assert read({"kind": "messages", "field": "chat"}, {"chat": turns, "messages": 0}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


def test_sharegpt_and_its_names_for_the_roles():
    names = {"system": "system", "human": "user", "user": "user"} | dict.fromkeys(
        ["gpt", "assistant", "chatgpt", "bard"], "assistant"
    )
    for name, role in names.items():
        assert read({"kind": "sharegpt"}, {"conversations": [{"from": name, "value": "v"}]}) == [(role, "v")]
    assert read({"kind": "sharegpt", "field": "x"}, {"x": [{"from": "human", "value": "v"}]}) == [
        ("user", "v")
    ]


def test_the_answer_of_a_preference_pair():
    record = {"conversations": [{"from": "human", "value": "q"}], "chosen": {"from": "gpt", "value": "a"}}
    assert read({"kind": "sharegpt", "answer_field": "chosen"}, record) == [("user", "q"), ("assistant", "a")]


def test_prompt_response():
    assert read({"kind": "prompt_response"}, {"prompt": "q", "response": "a"}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]
    fields = {"prompt_field": "p", "response_field": "r", "system_field": "s"}
    assert read({"kind": "prompt_response"} | fields, {"p": "q", "r": "a", "s": "be kind"})[0] == (
        "system",
        "be kind",
    )
    assert read({"kind": "prompt_response"} | fields, {"p": "q", "r": "a"}) == [
        ("user", "q"),
        ("assistant", "a"),
    ]


@pytest.mark.parametrize(
    ("conversation", "record", "reason", "message"),
    [
        ({"kind": "alpaca"}, {"output": "a"}, "missing_text", "no field 'instruction'; it has 'output'"),
        ({"kind": "alpaca"}, {"instruction": "q", "output": None}, "missing_text", "no field 'output'"),
        (
            {"kind": "alpaca"},
            {"instruction": "q", "output": 3},
            "wrong_type",
            "'output' must be a string, got int",
        ),
        (
            {"kind": "alpaca"},
            {"instruction": "q", "output": "a", "input": ["i"]},
            "wrong_type",
            "'input' must be a string, got list",
        ),
        ({"kind": "dolly"}, {}, "missing_text", "no field 'instruction'; it has no fields"),
        ({"kind": "messages"}, {"messages": "a"}, "malformed_messages", "must be a list"),
        (
            {"kind": "messages"},
            {"messages": [{"role": "tool", "content": ""}]},
            "no_place_for_role_tool",
            "'tool'",
        ),
        (
            {"kind": "messages"},
            {"messages": [{"role": "user", "content": ""}], "tools": [{"name": "f"}]},
            "no_place_for_tools",
            "the record has tools",
        ),
        (
            {"kind": "sharegpt"},
            {"conversations": [{"from": "observation", "value": ""}]},
            "no_place_for_role_observation",
            "message 1",
        ),
        (
            {"kind": "sharegpt"},
            {"conversations": [{"from": "human", "value": None}]},
            "null_content",
            "message 1",
        ),
        (
            {"kind": "alpaca"},
            {"instruction": "q", "output": "a", "images": ["a.png"]},
            "no_place_for_images",
            "the record has images, got",
        ),
        ({"kind": "sharegpt"}, {"conversations": [{"from": "mars", "value": ""}]}, "unknown_role", "'mars'"),
        (
            {"kind": "sharegpt"},
            {"conversations": [{"from": "gpt"}]},
            "malformed_messages",
            "message 1 must have",
        ),
        ({"kind": "sharegpt"}, {"conversations": [3]}, "malformed_messages", "message 1 must have"),
        ({"kind": "sharegpt"}, {"conversations": "a"}, "malformed_messages", "must be a list"),
        (
            {"kind": "sharegpt", "answer_field": "chosen"},
            {"conversations": []},
            "missing_text",
            "no field 'chosen'",
        ),
        ({"kind": "prompt_response"}, {"prompt": "q"}, "missing_text", "no field 'response'"),
    ],
)
def test_malformed_records_have_a_reason(conversation, record, reason, message):
    with pytest.raises(MalformedConversation, match=message) as caught:
        read(conversation, record)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("conversation", "message"),
    [
        (
            {"kind": "x"},
            'conversation.kind must be one of "alpaca", "dolly", "messages", "sharegpt", "prompt_response", '
            '"oasst", .*"x"',
        ),
        ({"kind": "messages", "field": ""}, 'conversation field must be a name, got ""'),
        ({"kind": "sharegpt", "answer_field": ""}, 'answer_field must be a name, got ""'),
        (
            {"kind": "sharegpt", "field": "a", "answer_field": "a"},
            "field, answer_field must be different names, got a, a",
        ),
        (
            {"kind": "prompt_response", "prompt_field": "response"},
            "must be different names, got response, response",
        ),
        ({"kind": "oasst", "lang": ""}, "lang must be a code"),
        ({"kind": "oasst_messages", "lang": ""}, "lang must be a code"),
    ],
)
def test_impossible_formats_are_refused(conversation, message):
    with pytest.raises(UserError, match=message):
        read(conversation, {})
