import pytest

from lumi.chat.messages import MalformedConversation
from lumi.config import UserError, from_dict
from lumi.corpus import JsonlSource


def read(conversation, record):
    """What a source with this config makes of a record, as (role, content) pairs."""
    source = from_dict(JsonlSource, {"name": "x", "paths": ["x"], "conversation": conversation})
    return [tuple(message) for message in source.conversation.read(record)]


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
        ({"kind": "messages"}, {"messages": [{"role": "tool", "content": ""}]}, "unknown_role", "'tool'"),
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
