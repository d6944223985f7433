from lumi.chat.messages import Message, canonical
from lumi.chat.pairs import Pair
from lumi.corpus.documents import bytes_of, count_chars, from_plain, text_of, to_plain

CONVERSATION = (Message("system", "Be kind."), Message("user", "Why?\n"), Message("assistant", "Für alle."))
PAIR = Pair(CONVERSATION[:2], (Message("assistant", "ü", "hm"),), (Message("assistant", "b"),))


def test_the_text_of_a_document():
    assert text_of("Für\n alle ") == "Für\n alle "
    assert text_of(CONVERSATION) == "Be kind.\nWhy?\n\nFür alle."
    assert text_of((Message("assistant", "b", "a"), Message("user", ""))) == "a\nb\n"
    assert text_of(PAIR) == "Be kind.\nWhy?\n\nhm\nü\nb"


def test_only_equal_documents_share_their_bytes():
    assert bytes_of("Für alle") == "Für alle".encode()
    one, two = (
        (Message("user", "a\nb"), Message("assistant", "c")),
        (Message("user", "a"), Message("assistant", "b\nc")),
    )
    assert text_of(one) == text_of(two)
    thought = (one[0], one[1]._replace(reasoning="d"))
    assert len({bytes_of(chat) for chat in (one, two, thought)}) == 3
    plain = PAIR._replace(chosen=(Message("assistant", "ü"),))
    swapped = Pair(PAIR.prompt, PAIR.rejected, PAIR.chosen)
    moved = Pair(PAIR.prompt[:1], (PAIR.prompt[1], *PAIR.chosen), PAIR.rejected)
    assert len({bytes_of(pair) for pair in (PAIR, plain, swapped, moved)}) == 4
    assert bytes_of(PAIR).splitlines() == [canonical(messages) for messages in PAIR]
    assert bytes_of(one) == b'[{"role":"user","content":"a\\nb"},{"role":"assistant","content":"c"}]'


def test_characters_are_those_of_the_contents():
    assert count_chars("Für\n alle ") == 10
    assert count_chars(CONVERSATION) == 8 + 5 + 9
    assert count_chars((Message("assistant", "b", "aa"),)) == 3
    assert count_chars(()) == 0
    assert count_chars(PAIR) == 8 + 5 + 2 + 1 + 1


def test_plain_values_give_the_document_back():
    for kind, document in {"texts": "Für", "conversations": CONVERSATION, "pairs": PAIR}.items():
        assert from_plain(to_plain(document), kind) == document
