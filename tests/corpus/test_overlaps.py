"""Cases worked out by hand, and many against sets of tuples."""

import random

import pytest

from lumi.corpus.evaluation_sets import EvaluationSet
from lumi.corpus.overlaps import Overlaps


def sets(**texts):
    return [EvaluationSet(name, "", [], len(each), each) for name, each in texts.items()]


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Yesterday THE CAT (sat -- on\na chair", "a"),  # four successive words of the first text
        ("cat sat on", ""),  # three of them
        ("the cat sat, then on the mat", ""),
        ("So: red,\nblue & green!", "a"),  # all words of the short text
        ("red blue", ""),
        ("red blue or green", ""),
        ("mat today red blue", ""),  # no n-gram goes from one text to the next
        ("on a mat today", "b"),
        ("the cat sat on a mat today", "a"),  # of both sets the first counts
        ("a chair stands on a mat today, and the cat sat on", "a"),
        ("today", ""),
        ("", ""),
    ],
)
def test_by_hand(text, name):
    found = sets(a=["the cat sat on the mat today", "red blue green"], b=["cat sat on a mat today"])
    assert Overlaps(found, 4).find(text) == name


def test_thirteen_words_are_found_and_twelve_are_not():
    words = [f"word{number}" for number in range(20)]
    overlaps = Overlaps(sets(exam=[" ".join(words)]), 13)
    assert overlaps.find(" ".join(["x", *words[4:17], "y"])) == "exam"
    assert overlaps.find(" ".join(["x", *words[4:16], "y", *words[17:20]])) == ""


def test_as_sets_of_tuples_find_it():
    chance = random.Random(0)

    def text(most):
        return [chance.choice("abcde") for _ in range(chance.randint(2, most))]

    texts = {name: [text(9) for _ in range(6)] for name in "xyz"}
    overlaps = Overlaps(sets(**{name: [" ".join(each) for each in texts[name]] for name in texts}), 5)
    runs = {
        name: {
            tuple(each[start : start + 5]) for each in texts[name] for start in range(max(1, len(each) - 4))
        }
        for name in texts
    }
    seen = set()
    for _ in range(400):
        words = text(14)
        inside = {
            tuple(words[start:end]) for start in range(len(words)) for end in range(start + 1, len(words) + 1)
        }
        expected = next((name for name in texts if runs[name] & inside), "")
        assert overlaps.find(" ".join(words)) == expected
        seen.add(expected)
    assert seen == {"", "x", "y", "z"}
