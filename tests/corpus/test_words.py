import pytest

from lumi.corpus.words import plain_words, split_words


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


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("The well-known\tFOX_trot, 3.5 times!", "the well known fox trot 3 5 times"),
        ("well @-@ known (Well—known) don’t don't", "well known well known don t don t"),
        ("ﬁn Ｆｕｌｌ e\u0301t\u00e9 soft\u00adhyphen zero\u200bwidth", "fin full été softhyphen zerowidth"),
        ("a\ud800b + x\u0007y\n= =", "ab xy"),
        ("नमस्ते दुनिया", "नमस्ते दुनिया"),  # signs of vowels are no punctuation
        ("图书馆。", "图 书 馆"),
        ("... —", ""),
    ],
)
def test_plain_words_have_neither_case_nor_punctuation(text, words):
    assert plain_words(text) == words.split()
