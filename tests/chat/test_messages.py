import pytest

from lumi.chat.messages import (
    MalformedConversation,
    Message,
    contents,
    find_disorder,
    from_json,
    parse_messages,
    to_json,
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
            "malformed_messages",
            "message 2 must have",
        ),
        ([{"content": "a"}], "malformed_messages", "message 1 must have"),
        (
            [{"role": "tool", "content": "a"}],
            "unknown_role",
            "message 1: role must be one of system, user, assistant, got 'tool'",
        ),
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
