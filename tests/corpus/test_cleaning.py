import unicodedata
from collections import Counter

import pytest

from lumi.corpus import CleaningConfig, clean_text

PYTHON_FILE = '''#!/usr/bin/env python3
"""Docstring with “curly” quotes — and a dash."""

def f(x):\t# tab, trailing spaces\x20\x20
\tif x == "ﬁ":  # a ligature
\t\treturn 'it\\'s &amp; fine' + "\\u00e9"


class C:
    pass
'''
MARKDOWN = (
    "# Title\n\n\n* item\twith tab\n  * nested — “quoted” ’apostrophe’  \n\n"
    "```c\nint\tx = a<b>>c;\n```\n| a | b |\n|---|---|\n\n…end\n"
)


def clean(text, **options):
    return clean_text(text, CleaningConfig(**options))


def test_details_are_scrubbed_after_the_repair():
    replaced = Counter()
    config = CleaningConfig(unescape_html=True, scrub=("email",))
    assert (
        clean_text("Frag me&#64;example.com, 8.8.8.8 schÃ¶n", config, replaced)
        == "Frag [EMAIL], 8.8.8.8 schön"
    )
    assert replaced == Counter(email=1)
    assert clean("me@example.com\x00") == "me@example.com"
    assert clean("8.8.8.8", scrub=("ip",)) == "[IP]"
    with pytest.raises(ValueError, match="scrub must be different details"):
        CleaningConfig(scrub=("ip", "ip"))


@pytest.mark.parametrize(
    "text",
    [PYTHON_FILE, MARKDOWN, "👩‍👩‍👧 ❤️ 🇩🇪", "日本語　全角ＡＢＣ", "  indented\n\n\n", "naïve café Straße"],
)
def test_text_that_is_not_broken_stays_byte_for_byte(text):
    assert clean(text) == text


def test_repair_text_undoes_mojibake_and_can_be_switched_off():
    assert clean("It costs 5 â‚¬, donâ€™t worry\n\tcode") == "It costs 5 €, don’t worry\n\tcode"
    assert clean("5 â‚¬", repair_text=False) == "5 â‚¬"


def test_unescape_html_is_an_option():
    assert clean("a &amp; b &lt;c&gt;") == "a &amp; b &lt;c&gt;"
    assert clean("a &amp; b &lt;c&gt;", unescape_html=True) == "a & b <c>"


def test_normalization():
    decomposed = unicodedata.normalize("NFD", "é")
    assert clean(decomposed) == "é"
    assert clean(decomposed, normalization="none") == decomposed
    assert clean("ﬁ é", normalization="NFKC") == "fi é"


def test_control_characters_go_but_newline_and_tab_stay():
    assert clean("a\x00b\x07\tc\x1b[31md\x1b[0m\x7f\n\x0ce\ufeff") == "ab\tcd\ne"
    assert clean("é\x00b\x08\n\té") == "éb\n\té"


@pytest.mark.parametrize("control", "\x0b \x0c \x1c \x1d \x1e \x1f \x85".split(" "))
@pytest.mark.parametrize("repair_text", [False, True])
def test_controls_that_separate_words_become_a_line_end(control, repair_text):
    assert clean(f"one{control}two", repair_text=repair_text) == "one\ntwo"
    assert clean(f"é{control}{control}\x00two", repair_text=False) == "é\ntwo"
    assert clean(f"{control}one\n{control}two{control}\n{control}", repair_text=repair_text) == "one\ntwo\n"


def test_a_next_line_within_broken_text_is_repaired():
    assert clean("Ã\x85ngström") == "Ångström"
    assert clean("wait\x85 \x93ok\x94") == "wait… “ok”"


def test_line_ends_become_newlines():
    assert clean("a\r\nb\rc\n\r\n") == "a\nb\nc\n\n"


def test_lone_surrogates_become_replacement_characters_and_pairs_their_character():
    assert clean("a\ud83d\ude00b \ud800c\udfff") == "a😀b \ufffdc\ufffd"
    assert clean("x\ud800").encode() == "x\ufffd".encode()
