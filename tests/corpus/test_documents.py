from lumi.chat.messages import Message
from lumi.corpus.documents import count_chars, text_of

CONVERSATION = (Message("system", "Be kind."), Message("user", "Why?\n"), Message("assistant", "Für alle."))


def test_the_text_of_a_document():
    assert text_of("Für\n alle ") == "Für\n alle "
    assert text_of(CONVERSATION) == "Be kind.\nWhy?\n\nFür alle."


def test_characters_are_those_of_the_contents():
    assert count_chars("Für\n alle ") == 10
    assert count_chars(CONVERSATION) == 8 + 5 + 9
    assert count_chars(()) == 0
