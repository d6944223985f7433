import importlib

import pytest

from lumi.config import UserError, from_dict
from lumi.corpus import FilterConfig
from lumi.corpus.filters import (
    classifier,
    duplicate_line_fractions,
    duplicate_ngram_char_fraction,
    find_fault,
    top_ngram_char_fraction,
)

OPEN = {
    "min_chars": 1,
    "blocked_phrases": (),
    "max_symbol_to_word_ratio": None,
    "max_duplicate_line_fraction": None,
    "max_duplicate_line_char_fraction": None,
    "max_top_ngram_char_fraction": None,
    "max_duplicate_ngram_char_fraction": None,
}
PROSE = (
    "The fox lives in the forest and hunts at dusk. Its den lies under an old oak, whose roots keep the rain"
    " out."
    " In spring there are four cubs, which learn to catch mice before summer is over; by autumn they leave."
)


def fault(text, **limits):
    return find_fault(text, FilterConfig(**{**OPEN, **limits}))


def test_prose_passes_the_defaults():
    assert find_fault(PROSE, FilterConfig()) == ""


@pytest.mark.parametrize(
    ("key", "value", "good", "bad", "reason"),
    [
        ("min_chars", 5, "12345", "1234", "too_short"),
        ("max_chars", 5, "12345", "123456", "too_long"),
        ("blocked_phrases", ("Lorem Ipsum",), "lorem", "a LOREM ipsum b", "blocked_phrase"),
        ("max_symbol_to_word_ratio", 0.5, "# a", "# # a", "symbol_to_word_ratio"),
        ("max_symbol_to_word_ratio", 0.0, "a b", "a b…", "symbol_to_word_ratio"),
        ("max_duplicate_line_fraction", 0.25, "a\nb\n\n\nc\na", "a\na\nb", "duplicate_lines"),
        (
            "max_duplicate_line_char_fraction",
            0.2,
            "a\na\nbbbbbbbbbbb",
            "aaa\naaa\nbb",
            "duplicate_line_chars",
        ),
        ("max_top_ngram_char_fraction", 0.5, "a b c d a b c d", "a b a b c", "top_ngram"),
        (
            "max_duplicate_ngram_char_fraction",
            0.5,
            "a b c d e f a b c d e",
            "a b c d e a b c d e a b c d e",
            "duplicate_ngrams",
        ),
    ],
)
def test_each_limit(key, value, good, bad, reason):
    assert fault(good, **{key: value}) == ""
    assert fault(bad, **{key: value}) == reason
    if key != "max_chars" and key != "min_chars":
        assert fault(bad, **{key: () if key == "blocked_phrases" else None}) == ""


def test_sizes_of_ngrams_count():
    text = "x y p x y q x y r"
    assert fault(text, max_top_ngram_char_fraction=0.5, top_ngram_words=2) == "top_ngram"
    assert fault(text, max_top_ngram_char_fraction=0.5, top_ngram_words=3) == ""
    assert fault(text, max_duplicate_ngram_char_fraction=0.3, duplicate_ngram_words=2) == "duplicate_ngrams"
    assert fault(text, max_duplicate_ngram_char_fraction=0.3, duplicate_ngram_words=3) == ""


def test_fractions_by_hand():
    assert duplicate_line_fractions("aa\n aa \nbbb\n\naa") == (2 / 4, 4 / 9)
    assert duplicate_line_fractions("\n \n") == (0.0, 0.0)
    assert top_ngram_char_fraction(["a", "bb", "a", "bb", "c"], 2) == 6 / 7
    assert top_ngram_char_fraction(["a", "a", "a", "a"], 2) == 1.0
    assert top_ngram_char_fraction(["a"], 2) == top_ngram_char_fraction(["a", "b"], 2) == 0.0
    # "x y z" comes back once: 3 of 7 characters; with overlaps "x x x x": words 2, 3, 4 lie in repeats
    assert duplicate_ngram_char_fraction(["x", "y", "z", "w", "x", "y", "z"], 3) == 3 / 7
    assert duplicate_ngram_char_fraction(["x", "x", "x", "x"], 2) == 3 / 4


def test_languages():
    german = "Der Fuchs lebt im Wald und jagt in der Dämmerung; sein Bau liegt unter einer alten Eiche."
    classify = classifier(("en", "de"))
    assert (classify(PROSE), classify(german)) == ("en", "de")
    with pytest.raises(UserError, match=r"must be among .*en.*got qq"):
        classifier(("qq",))


TAKEN_FOR_WU = (
    "织田信长（1534年6月23日—1582年6月21日），是日本战国时代至安土桃山时代的武将、大名，战国三英杰之一。"
)


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("zh", TAKEN_FOR_WU),
        ("zh", "今天天氣很好，我們去公園散步。孩子們在草地上玩耍，老人們在樹下下棋。這是一個安靜的下午。"),
        (
            "zh",
            "本教程使用 Python 的 asyncio 实现异步客户端，然后创建 session。",
        ),
        ("yue", "我哋今日去咗公園行街，啲細路喺草地度玩，佢哋好開心。"),
        (
            "ja",
            "織田信長（おだ のぶなが）は、日本の戦国時代から安土桃山時代にかけての武将・大名。尾張国出身。",
        ),
        ("ja", "このチュートリアルでは、Python の asyncio を使って、非同期クライアントを実装します。"),
        ("th", "กรุงเทพมหานครเป็นเมืองหลวงและนครที่มีประชากรมากที่สุดของประเทศไทย"),
        ("lo", "ນະຄອນຫຼວງວຽງຈັນເປັນເມືອງຫຼວງຂອງສາທາລະນະລັດປະຊາທິປະໄຕປະຊາຊົນລາວ"),
        ("km", "ភ្នំពេញគឺជារាជធានីនៃព្រះរាជាណាចក្រកម្ពុជា"),
        ("my", "ရန်ကုန်မြို့သည် မြန်မာနိုင်ငံ၏ အကြီးဆုံးမြို့ဖြစ်သည်။"),
        ("ko", "오늘은 날씨가 좋아서 공원으로 산책을 갔습니다."),
    ],
)
def test_languages_without_spaces(language, text):
    pytest.importorskip("py3langid")
    assert classifier(("en",))(text) == language
    assert classifier(("en",))(text * 20) == language


def test_wu_is_chinese_unless_it_is_asked_for():
    pytest.importorskip("py3langid")
    assert classifier(("zh", "wuu"))(TAKEN_FOR_WU) == "wuu"


def test_languages_without_py3langid(monkeypatch):
    def missing(name):
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    classifier.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'lumi-train\[langid\]'"):
        classifier(("en",))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_chars": 0}, "min_chars must be at least 1, got 0"),
        ({"max_chars": 10}, r"max_chars must be at least min_chars \(200\), got 10"),
        ({"blocked_phrases": [" "]}, "blocked_phrases must not be empty"),
        ({"max_symbol_to_word_ratio": -0.1}, "max_symbol_to_word_ratio must be at least 0, got -0.1"),
        (
            {"max_duplicate_line_fraction": 1.5},
            "max_duplicate_line_fraction must be within 0 and 1, or null .* got 1.5",
        ),
        ({"max_duplicate_line_char_fraction": 2.0}, "max_duplicate_line_char_fraction must be within"),
        ({"max_top_ngram_char_fraction": -1.0}, "max_top_ngram_char_fraction must be within"),
        ({"max_duplicate_ngram_char_fraction": 2.0}, "max_duplicate_ngram_char_fraction must be within"),
        ({"top_ngram_words": 0}, "top_ngram_words must be at least 1, got 0"),
        ({"duplicate_ngram_words": 0}, "duplicate_ngram_words must be at least 1, got 0"),
        ({"languages": []}, "languages must be codes"),
        ({"languages": ["EN"]}, r"languages must be codes .*got \['EN'\]"),
    ],
)
def test_impossible_values_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        from_dict(FilterConfig, values)


CHINESE = (
    "清晨的港口很安静，渔船一条接一条地回来，甲板上堆满了银色的鱼。"
    "老陈站在码头边，望着远处的海面，心里想着昨夜的风……他的儿子还没有回家。"
)
JAPANESE = (
    "彼は駅の前でしばらく立ち止まった。雨はまだ降り続いていて、人々が屋根の下に"
    "集まっている……電車は三十分遅れる。"
)
THAI = "เช้าวันนี้อากาศดีมากชาวประมงกลับมาจากทะเลพร้อมปลามากมายเด็กวิ่งเล่นบนหาดทรายและหัวเราะกัน..."


@pytest.mark.parametrize("text", [CHINESE, JAPANESE, THAI])
def test_an_ellipsis_in_a_script_without_spaces_does_no_harm(text):
    assert find_fault(text, FilterConfig(min_chars=10)) == ""
    assert fault("……" * 9 + text[:40], max_symbol_to_word_ratio=0.1) == "symbol_to_word_ratio"
