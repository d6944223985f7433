import pytest

from lumi.chat.messages import (
    MalformedConversation,
    Message,
    canonical,
    contents,
    find_disorder,
    from_json,
    parse_messages,
    to_json,
    unknown_message_fields,
)

SYSTEM, USER, ASSISTANT = (Message(role, role) for role in ("system", "user", "assistant"))


def test_messages_survive_the_way_to_json_and_back():
    data = [
        {"role": "system", "content": ""},
        {"role": "user", "content": "ü\n"},
        {"role": "assistant", "content": "b"},
    ]
    messages = parse_messages(data)
    assert messages == (Message("system", ""), Message("user", "ü\n"), Message("assistant", "b"))
    assert to_json(messages) == data
    assert from_json(data) == messages
    assert parse_messages([data[1] | {"name": "x"}]) == (Message("user", "ü\n"),)


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_survives_under_one_name(field):
    messages = parse_messages([{"role": "assistant", "content": "b", field: "a\n", "name": None}])
    assert messages == (Message("assistant", "b", "a\n"),)
    data = to_json(messages)
    assert data == [{"role": "assistant", "content": "b", "reasoning_content": "a\n"}]
    assert parse_messages(data) == from_json(data) == messages
    assert canonical(messages) == b'[{"role":"assistant","content":"b","reasoning_content":"a\\n"}]'


def test_reasoning_under_two_names_must_be_the_same():
    answer = {"role": "assistant", "content": "b", "reasoning_content": "a"}
    assert parse_messages([answer | {"reasoning": "a"}]) == (Message("assistant", "b", "a"),)
    with pytest.raises(MalformedConversation, match="message 1 must have one reasoning"):
        parse_messages([answer | {"reasoning": "c"}])


def test_without_reasoning_nothing_changes():
    data = [{"role": "user", "content": "ü"}, {"role": "assistant", "content": "b", "reasoning_content": ""}]
    messages = parse_messages(data)
    assert (
        canonical(messages) == '[{"role":"user","content":"ü"},{"role":"assistant","content":"b"}]'.encode()
    )
    assert from_json([data[1] | {"reasoning_content": None}]) == messages[1:]


def test_developers_are_the_system_and_parts_of_text_stand_below_each_other():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b\n", "image_url": None}]
    data = [{"role": "developer", "content": "s"}, {"role": "user", "content": parts}]
    assert parse_messages(data) == (Message("system", "s"), Message("user", "a\nb\n"))


@pytest.mark.parametrize("value", [None, "", " ", [], {}, "[]", [None], {"name": None, "arguments": ""}])
def test_empty_fields_of_others_and_weights_of_one_do_no_harm(value):
    fields = {"tool_calls": value, "function_call": value, "refusal": value, "weight": 1, "train": True}
    answer = {"role": "assistant", "content": "b", "reasoning_content": value}
    assert parse_messages([answer | fields]) == (Message("assistant", "b"),)


def test_unknown_fields_are_named_once():
    data = [
        {"role": "user", "content": "a", "name": "x"},
        {"role": "user", "id": 0, "name": "y", "mood": ""},
        3,
    ]
    assert unknown_message_fields(data) == ["name", "id"]
    assert unknown_message_fields(data, known=("role", "content", "name")) == ["id"]
    assert unknown_message_fields("text") == []


def test_contents_stand_below_each_other():
    assert contents((Message("user", 'q "\\ \n\u2028😀'), Message("assistant", ""))) == 'q "\\ \n\u2028😀\n'


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        ([], "malformed_messages", r"a list of at least one message, got '\[\]'"),
        ("hello", "malformed_messages", "a list of at least one message, got 'hello'"),
        ({"role": "user", "content": "a"}, "malformed_messages", "a list of at least one message"),
        (["a"], "malformed_messages", "message 1 must have a role and a content, got 'a'"),
        (
            [{"role": "user", "content": "a"}, {"role": "assistant", "content": None}],
            "null_content",
            "message 2 has a content that is null",
        ),
        ([{"content": "a"}], "malformed_messages", "message 1 must have"),
        (
            [{"role": "mars", "content": "a"}],
            "unknown_role",
            "message 1: role must be one of system, user, assistant, developer, got 'mars'",
        ),
        ([{"role": "tool", "content": "a"}], "no_place_for_role_tool", "message 1 has the role 'tool'"),
        (
            [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}],
            "no_place_for_tool_calls",
            r"message 1 has tool_calls, got \"\[{'id': 'c'}\]\"",
        ),
        (
            [{"role": "user", "content": "a", "reasoning_content": "b"}],
            "no_place_for_reasoning_content",
            "message 1 has reasoning_content, got 'b'",
        ),
        (
            [{"role": "assistant", "content": "a", "weight": 0}],
            "no_place_for_weight",
            "message 1 has the weight 0",
        ),
        (
            [{"role": "assistant", "content": "a", "train": False}],
            "no_place_for_train",
            "message 1 has the train False",
        ),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url"}]}],
            "no_place_for_part_image_url",
            "message 1 has a part of type 'image_url'",
        ),
        ([{"role": "user", "content": [{"type": "x y"}]}], "no_place_for_other", "a part of type 'x y'"),
        ([{"role": "user", "content": ["a"]}], "malformed_messages", "each part must be {.*}, got 'a'"),
        ([{"role": "user", "content": [{"type": "text"}]}], "malformed_messages", "each part must be"),
        ([{"role": "user", "content": 3}], "malformed_messages", "a text or a list of parts, got '3'"),
    ],
)
def test_what_is_no_list_of_messages_has_a_reason(data, reason, message):
    with pytest.raises(MalformedConversation, match=message) as caught:
        parse_messages(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("messages", "disorder"),
    [
        ([USER, ASSISTANT], ""),
        ([SYSTEM, USER, ASSISTANT, USER, ASSISTANT], ""),
        ([USER, ASSISTANT, USER], ""),
        ([USER, SYSTEM, ASSISTANT], "system_not_first"),
        ([SYSTEM, SYSTEM, USER, ASSISTANT], "system_not_first"),
        ([ASSISTANT, USER, ASSISTANT], "roles_do_not_alternate"),
        ([USER, USER, ASSISTANT], "roles_do_not_alternate"),
        ([SYSTEM, ASSISTANT], "roles_do_not_alternate"),
        ([SYSTEM, USER], "no_answer"),
        ([], "no_answer"),
    ],
)
def test_disorder(messages, disorder):
    assert find_disorder(messages) == disorder
