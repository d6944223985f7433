import pytest

from lumi.corpus.words import split_words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "The fox\n lives — “here”.\x0bNaïve Привет 한국어 문장",
            None,
        ),  # all scripts with spaces: as Python does
        ("图书馆…在 山坡ABC上。", ["图", "书", "馆", "…", "在", "山", "坡", "ABC", "上", "。"]),
        ("日々カタカナｶﾅ", list("日々カタカナｶﾅ")),
        ("ไปไหน", list("ไปไหน")),
        ("𠀀x\u3000y", ["𠀀", "x", "y"]),
        ("", []),
    ],
)
def test_words_are_separated_by_spaces_or_stand_for_themselves(text, words):
    assert split_words(text) == (text.split() if words is None else words)


@pytest.mark.parametrize("character", "漢 ひ カ ㄅ ก ກ ཀ က ក".split())
def test_each_script_without_spaces_is_known(character):
    assert split_words(character * 3 + "!") == [character] * 3 + ["!"]
