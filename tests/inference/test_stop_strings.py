import random

import pytest

from lumi.inference.stop_strings import StoppingText


class Letters:
    """A tokenizer whose tokens are the pieces that it is given."""

    def __init__(self, *pieces):
        self.pieces = pieces

    def piece_bytes(self, token):
        return self.pieces[token]


def feed(stops, *pieces):
    """What comes out after each piece, and at the end."""
    text = StoppingText(Letters(*pieces), stops)
    out = []
    for token in range(len(pieces)):
        out.append(text.feed(token))
        if text.stopped:
            return out
    return [*out, text.flush()]


@pytest.mark.parametrize(
    ("stops", "pieces", "expected"),
    [
        ((), (b"ab", b"c"), ["ab", "c", ""]),
        (("c",), (b"ab", b"cd"), ["ab", ""]),
        (("bcd",), (b"ab", b"c", b"de"), ["a", "", ""]),
        (("bcd",), (b"ab", b"c", b"e"), ["a", "", "bce", ""]),
        (("bcd",), (b"ab",), ["a", "b"]),  # held back, and given when the ids end
        (("abab",), (b"aba", b"bab"), ["", ""]),
        (("aab",), (b"aa", b"a", b"b"), ["", "a", ""]),
        (("xyz", "b"), (b"abx",), ["a"]),
        (("abc", "b"), (b"abc",), ["a"]),  # the one that is complete first
        (("\u00e9",), (b"a\xc3", b"\xa9b"), ["a", ""]),  # a character in two tokens
        (("q",), (b"a\xc3",), ["a", "\ufffd"]),
    ],
)
def test_stops(stops, pieces, expected):
    assert feed(stops, *pieces) == expected


def test_any_cutting_gives_the_text_up_to_the_first_stop():
    random.seed(0)
    for _ in range(3000):
        text = "".join(random.choices("ab\u00e9\n", k=random.randrange(1, 20)))
        stops = ["".join(random.choices("ab\u00e9\n", k=random.randrange(1, 4))) for _ in range(2)]
        data, pieces = text.encode(), []
        while data:
            cut = random.randrange(1, 4)
            pieces.append(data[:cut])
            data = data[cut:]
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        assert "".join(feed(stops, *pieces)) == text[: min(found)[1] if found else len(text)]
