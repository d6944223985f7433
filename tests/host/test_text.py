import pytest

from lumi.config import UserError
from lumi.host.text import utf8


@pytest.mark.parametrize("text", ["", "a\0b", "é漢🎉", "\ufeff\uffff\U0010ffff"])
def test_text_comes_back(text):
    assert utf8(text).decode() == text


@pytest.mark.parametrize(
    ("text", "place"), [("\ud800", "U+D800 at character 0"), ("é🎉\udfff", "U+DFFF at character 2")]
)
def test_a_lone_surrogate_is_named_with_its_place(text, place):
    with pytest.raises(UserError) as caught:
        utf8(text)
    assert str(caught.value) == f"text must be valid Unicode, got the lone surrogate {place}"
