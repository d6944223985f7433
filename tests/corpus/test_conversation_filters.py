import pytest

from lumi.chat.messages import Message
from lumi.chat.pairs import Pair
from lumi.corpus import CleaningConfig, ConversationFilterConfig
from lumi.corpus.conversation_filters import (
    clean_conversation,
    clean_pair,
    find_conversation_fault,
    find_pair_fault,
)


def talk(*turns):
    """("u", "hello") -> a user's message."""
    roles = {"s": "system", "u": "user", "a": "assistant"}
    return tuple(Message(roles[letter], content) for letter, content in turns)


def fault(messages, **limits):
    return find_conversation_fault(messages, ConversationFilterConfig(**limits))


def cleaned(messages, **settings):
    return clean_conversation(messages, CleaningConfig(**settings))


def test_every_content_is_cleaned():
    messages = talk(("s", "a\x00"), ("u", "b\r\n"), ("a", "â‚¬"))
    assert cleaned(messages) == talk(("s", "a"), ("u", "b\n"), ("a", "€"))
    assert cleaned(messages, repair_text=False)[2].content == "â‚¬"


def test_reasoning_is_cleaned_and_searched_too():
    (question,) = talk(("u", "q"))
    messages = (question, Message("assistant", "a", "As an AI\x00 language model\r\n"))
    assert cleaned(messages)[1].reasoning == "As an AI language model\n"
    assert fault(cleaned(messages)) == "blocked_phrase"
    assert fault(messages) == ""


def test_a_pair_is_cleaned_and_judged_with_its_reasoning():
    (ask,), bad = talk(("u", "q")), Message("assistant", "b", "d\x00")
    earlier = Message("assistant", "a", "c\r\n")
    pair = Pair((ask, earlier, ask), (Message("assistant", "a\r\n"),), (bad,))
    cleaned = clean_pair(pair, CleaningConfig())
    assert [message.reasoning for message in cleaned.messages] == ["", "c\n", "", "", "d"]
    config = ConversationFilterConfig()
    assert find_pair_fault(cleaned, config) == ""
    for content in ("b", "d\nb"):
        assert find_pair_fault(cleaned._replace(chosen=(Message("assistant", content),)), config) == ""
    same = cleaned._replace(chosen=(Message("assistant", " b", "d\n"),))
    assert find_pair_fault(same, config) == "equal_answers"


def test_what_the_user_said_last_is_cut_off():
    assert cleaned(talk(("u", "a"), ("a", "b"), ("u", "c"))) == talk(("u", "a"), ("a", "b"))
    assert cleaned(talk(("u", "a"), ("a", "b"), ("u", "c"), ("u", "d"))) == talk(("u", "a"), ("a", "b"))
    assert fault(cleaned(talk(("s", "s"), ("u", "a")))) == "no_answer"


def test_a_blank_system_message_is_left_out():
    assert cleaned(talk(("s", " \x00"), ("u", "a"), ("a", "b"))) == talk(("u", "a"), ("a", "b"))


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (talk(("u", "a"), ("a", "b")), ""),
        (talk(("s", "x"), ("u", "a"), ("a", "b")), ""),
        (talk(("a", "b"), ("u", "a"), ("a", "b")), "roles_do_not_alternate"),
        (talk(("u", "a"), ("s", "x"), ("a", "b")), "system_not_first"),
        ((), "no_answer"),
        (talk(("u", " \n"), ("a", "b")), "empty_turn"),
        (talk(("u", "a"), ("a", "")), "empty_turn"),
    ],
)
def test_structure(messages, reason):
    assert fault(messages) == reason


def test_limits():
    messages = talk(
        ("s", "x"), ("u", "As an AI language model"), ("a", "four"), ("u", "b"), ("a", "Sorry, no: five")
    )
    assert fault(messages) == ""
    assert fault(messages, max_messages=5) == ""
    assert fault(messages, max_messages=4) == "too_many_messages"
    assert fault(messages, min_answer_chars=4) == ""
    assert fault(messages, min_answer_chars=5) == "short_answer"
    assert fault(messages, blocked_phrases=("x", "SORRY, NO")) == "blocked_phrase"
    assert fault(talk(("u", "a"), ("a", "I, as an AI language model, decline"))) == "blocked_phrase"
    assert fault(talk(("u", "a"), ("a", "I, as an AI language model, decline")), blocked_phrases=()) == ""


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"max_chars": 1}, "max_chars must be at least 2, got 1"),
        ({"max_messages": 1}, "max_messages must be at least 2, or null for any number, got 1"),
        ({"min_answer_chars": 0}, "min_answer_chars must be at least 1, got 0"),
        ({"blocked_phrases": (" ",)}, "blocked_phrases must not be empty texts"),
        ({"languages": ("EN",)}, "languages must be codes"),
    ],
)
def test_impossible_limits_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        ConversationFilterConfig(**values)
