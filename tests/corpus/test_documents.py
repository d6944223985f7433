from lumi.chat.messages import Message
from lumi.corpus.documents import bytes_of, count_chars, text_of

CONVERSATION = (Message("system", "Be kind."), Message("user", "Why?\n"), Message("assistant", "Für alle."))


def test_the_text_of_a_document():
    assert text_of("Für\n alle ") == "Für\n alle "
    assert text_of(CONVERSATION) == "Be kind.\nWhy?\n\nFür alle."
    assert text_of((Message("assistant", "b", "a"), Message("user", ""))) == "a\nb\n"


def test_only_equal_documents_share_their_bytes():
    assert bytes_of("Für alle") == "Für alle".encode()
    one, two = (
        (Message("user", "a\nb"), Message("assistant", "c")),
        (Message("user", "a"), Message("assistant", "b\nc")),
    )
    assert text_of(one) == text_of(two)
    thought = (one[0], one[1]._replace(reasoning="d"))
    assert len({bytes_of(chat) for chat in (one, two, thought)}) == 3
    assert bytes_of(one) == b'[{"role":"user","content":"a\\nb"},{"role":"assistant","content":"c"}]'


def test_characters_are_those_of_the_contents():
    assert count_chars("Für\n alle ") == 10
    assert count_chars(CONVERSATION) == 8 + 5 + 9
    assert count_chars((Message("assistant", "b", "aa"),)) == 3
    assert count_chars(()) == 0
