"""WikiText (Merity et al. 2016, arXiv:1609.07843) as lm-evaluation-harness reads it: whole pages, its token marks taken out again.

The raw text is one sentence of tokens a line, with spaces around punctuation and "@-@", "@,@", "@.@" for what stood without. A model is
given the text as it was once written; words and bytes are counted on what stands in the file, so that figures compare.
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
        rows: the file, whole or in lines with their ends; the hub's data set has "" where the file has the blank line " \\n".
    """
    found: list[list[str]] = [[]]
    for line in "".join(row or " \n" for row in rows).split("\n"):
        if _is_title(line.strip()):
            found.append([])
        found[-1].append(line)
    texts = ["\n".join(lines) for lines in found]
    return [text for text in texts if text.strip()]


def detokenize(page: str) -> str:
    """The text of a page as it was before it was cut into tokens (in the harness's version, its order of replacements included)."""
    for old, new in _JOINED:
        page = page.replace(old, new)
    for pattern, new in _PAIRS:
        page = pattern.sub(new, page)
    for old, new in _REST:
        page = page.replace(old, new)
    return page


def _is_title(line: str) -> bool:
    """Whether it is a heading of the first level, and not " = = Section = = "."""
    return (
        line.startswith("= ")
        and line.endswith(" =")
        and not line.startswith("= =")
        and not line.endswith("= =")
    )
