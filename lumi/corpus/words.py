"""The words of a text, also in scripts that put no spaces between them."""

import re
import unicodedata

# Thai, Lao, Tibetan, Myanmar and Khmer; kana, Bopomofo and Han with their marks of repetition.
_UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u19e0-\u19ff"
    "\u3005-\u3007\u3031-\u3035\u303b\u3040-\u312f\u31a0-\u31bf\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff"
    "\uf900-\ufaff\uff66-\uff9f\U00020000-\U000323af"
)
_CHARACTER = re.compile(f"[{_UNSPACED}]")
_WORD = re.compile(f"[{_UNSPACED}]|[^{_UNSPACED}\\s]+")


def split_words(text: str) -> list[str]:
    """Words by white space. Each character of a script without spaces counts as a word of its own.

    True words would need a dictionary for each language. For counts and for overlaps, characters do as well.
    """
    if text.isascii() or not _CHARACTER.search(text):
        return text.split()  # several times as fast
    return _WORD.findall(text)


def plain_words(text: str) -> list[str]:
    """The words of a text in lower case. Punctuation and symbols separate words as white space does.

    So "well-known", "well @-@ known" and "(Well known)" are the same two words. Compatibility forms such as a
    ligature count as their letters (Unicode NFKC). Invisible characters count for nothing.
    """
    return split_words(unicodedata.normalize("NFKC", text).lower().translate(_PLAIN))


class _Plain(dict[int, int | str | None]):
    """A table for `str.translate`, filled as characters occur."""

    def __missing__(self, code: int) -> int | str | None:
        character = chr(code)
        kind = unicodedata.category(character)[0]  # P: punctuation, S: symbols, C: controls and the like
        if kind in "PS" or character.isspace():
            self[code] = " "
        else:
            self[code] = None if kind == "C" else code
        return self[code]


_PLAIN = _Plain()
