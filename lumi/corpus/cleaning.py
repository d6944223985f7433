"""Repair of broken text that leaves prose, code and emoji as they were written."""

import functools
import re
import unicodedata
from collections import Counter
from dataclasses import dataclass
from typing import Literal

import ftfy

from lumi.corpus.scrubbing import Detail, scrub

TERMINAL_ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
# Runs of Unicode's category Cc without tab and newline, and the byte order mark.
_CONTROL = "[\x00-\x08\x0b-\x1f\x7f-\x9f\ufeff]"
CONTROLS = re.compile(f"{_CONTROL}{_CONTROL}*")  # is found faster than one or more
SEPARATORS = frozenset("\x0b\x0c\x1c\x1d\x1e\x1f\x85")  # of pages, lines or fields: white space to Python
# The control "next line", unless it is the second byte of a letter that was decoded with the wrong encoding.
NEXT_LINE = re.compile("(?<![\xc2-\xf4])\x85")
OTHER_C1 = re.compile("[\x80-\x84\x86-\x9f]")


@dataclass(frozen=True, kw_only=True)
class CleaningConfig:
    """`repair_text`: undo mojibake (ftfy). `unescape_html`: &amp; -> &. `normalization`: the Unicode form.

    `scrub`: personal details that become a placeholder: "email" [EMAIL], "ip" [IP], "phone" [PHONE]. IP
    addresses of private networks stay. Phone numbers need a country code, or the form of North America.
    """

    repair_text: bool = True
    unescape_html: bool = False
    normalization: Literal["none", "NFC", "NFKC"] = "NFC"
    scrub: tuple[Detail, ...] = ()

    def __post_init__(self) -> None:
        if len(set(self.scrub)) < len(self.scrub):
            raise ValueError(f"scrub must be different details, got {list(self.scrub)}")


def clean_text(text: str, config: CleaningConfig, replaced: Counter[str] | None = None) -> str:
    """Repair a text, and scrub it.

    Line ends become \\n, as do controls that separate words, such as form feeds. Lone surrogates and all
    other control characters but \\n and \\t go.

    Quotes, ligatures, tabs, spaces and line breaks stay, so that code comes out byte for byte.

    Args:
        replaced: takes how many details of each kind became placeholders.

    Source: ftfy (Speer 2019) for the repair of text that was decoded with the wrong encoding.
    """
    text = _repair(text, config)
    if not config.scrub:
        return text
    return scrub(text, config.scrub, Counter() if replaced is None else replaced)


def _repair(text: str, config: CleaningConfig) -> str:
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if text.isascii() and not (config.unescape_html and "&" in text):
        return _remove_controls(text)
    text = _mend_surrogates(text)
    if "\x85" in text and not OTHER_C1.search(text):  # beside others ftfy takes it for the "…" of Windows
        text = NEXT_LINE.sub("\x0b", text)  # a separator that ftfy leaves alone
    if config.repair_text or config.unescape_html:
        settings = _ftfy_settings(config)
        # ftfy works line by line. It would leave lines of ASCII as they are, but they would cost time.
        lines = text.split("\n")
        text = "\n".join(
            line if line.isascii() and not config.unescape_html else ftfy.fix_text(line, settings)
            for line in lines
        )
    text = _remove_controls(text)
    return text if config.normalization == "none" else unicodedata.normalize(config.normalization, text)


def _remove_controls(text: str) -> str:
    return CONTROLS.sub(_replacement, TERMINAL_ESCAPE.sub("", text))


def _replacement(controls: re.Match[str]) -> str:
    """A line end for controls that separate words, where none stands beside them; nothing for others."""
    text, (start, end) = controls.string, controls.span()
    inside = start > 0 and end < len(text)
    if SEPARATORS.isdisjoint(controls[0]) or not inside or "\n" in (text[start - 1], text[end]):
        return ""
    return "\n"


def _mend_surrogates(text: str) -> str:
    """Pairs of surrogates become their character, lone ones U+FFFD: UTF-8 can encode neither."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


@functools.cache
def _ftfy_settings(config: CleaningConfig) -> ftfy.TextFixerConfig:
    return ftfy.TextFixerConfig(
        unescape_html=config.unescape_html,
        remove_terminal_escapes=False,
        fix_encoding=config.repair_text,
        fix_c1_controls=config.repair_text,
        fix_latin_ligatures=False,
        fix_character_width=False,
        uncurl_quotes=False,
        fix_line_breaks=False,
        fix_surrogates=False,
        remove_control_chars=False,
        normalization=None,
        explain=False,
    )
