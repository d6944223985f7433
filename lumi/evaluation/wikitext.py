"""WikiText (Merity et al. 2016, arXiv:1609.07843) as lm-evaluation-harness reads it: detokenised pages.

The file is cut into tokens: it has spaces around punctuation, and "@-@", "@,@" and "@.@" inside words and
numbers. The model gets the text as it was written; words and bytes are counted in the file, so that figures
compare.
"""

import re
from collections.abc import Iterable

_JOINED = (
    ("s '", "s'"),
    (" @-@ ", "-"),
    (" @,@ ", ","),
    (" @.@ ", "."),
    *((f" {mark} ", f"{mark} ") for mark in ":;.!?,"),
)
_PAIRS = (
    (re.compile(r"\(\s*([^\)]*?)\s*\)"), r"(\1)"),
    (re.compile(r"\[\s*([^\]]*?)\s*\]"), r"[\1]"),
    (re.compile(r"{\s*([^}]*?)\s*}"), r"{\1}"),
    (re.compile(r"\"\s*([^\"]*?)\s*\""), r'"\1"'),
    (re.compile(r"'\s*([^']*?)\s*'"), r"'\1'"),
)
_REST = (
    ("= = = =", "===="),
    ("= = =", "==="),
    ("= =", "=="),
    (" ° ", "°"),
    (" \n", "\n"),
    ("\n ", "\n"),
    (" N ", " 1 "),
    (" 's", "'s"),
)


def pages(rows: Iterable[str]) -> list[str]:
    """The pages of a WikiText split; each begins with its heading, " = Title = ".

    Args:
        rows: the file, whole or in lines with their ends. The hub's dataset has "" where the file has the
            line " \\n".
    """
    found: list[list[str]] = [[]]
    for line in "".join(row or " \n" for row in rows).split("\n"):
        if _is_title(line.strip()):
            found.append([])
        found[-1].append(line)
    texts = ["\n".join(lines) for lines in found]
    return [text for text in texts if text.strip()]


def detokenize(page: str) -> str:
    """The text of a page before it was cut into tokens, by the harness's replacements in their order."""
    for old, new in _JOINED:
        page = page.replace(old, new)
    for pattern, new in _PAIRS:
        page = pattern.sub(new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def _is_title(line: str) -> bool:
    """Whether a line is a heading of the first level; " = = Section = = " is not."""
    return (
        line.startswith("= ")
        and line.endswith(" =")
        and not line.startswith("= =")
        and not line.endswith("= =")
    )
