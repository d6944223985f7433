"""Quality filters after Gopher (Rae et al. 2021, appendix A.1.1) and C4 (Raffel et al. 2020, section 2.2).

Null switches a filter off. The first filter that a document fails, in the order of the fields, drops it.
"""

import functools
import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lumi.config import UserError
from lumi.corpus.words import split_words

# The start of a document decides its language: the whole of a long one would cost more than all else.
LANGUAGE_CHARS = 4_000
SYMBOLS = ("#", "...", "…")


@dataclass(frozen=True, kw_only=True)
class FilterConfig:
    """Limits of a document that is kept; the defaults suit web pages and prose.

    N-grams are of words by white space. In Chinese, Japanese or Thai that is a run of sentences, so only
    long repetitions count: five characters recur in any good page. For symbols each character is a word.
    """

    # Shorter documents are dropped.
    min_chars: int = 200
    # Longer documents are dropped.
    max_chars: int = 1_000_000
    # A document with one of these phrases is dropped, whatever its case.
    blocked_phrases: tuple[str, ...] = ("lorem ipsum",)
    # The most hashes and ellipses per word; null: off.
    max_symbol_to_word_ratio: float | None = 0.1
    # The largest share of lines that repeat an earlier line; null: off.
    max_duplicate_line_fraction: float | None = 0.3
    # The largest share of characters in such lines; null: off.
    max_duplicate_line_char_fraction: float | None = 0.2
    # The words in an n-gram of the next limit.
    top_ngram_words: int = 2
    # The largest share of characters in the most frequent n-gram; null: off.
    max_top_ngram_char_fraction: float | None = 0.2
    # The words in an n-gram of the next limit.
    duplicate_ngram_words: int = 5
    # The largest share of characters in repeated n-grams; null: off.
    max_duplicate_ngram_char_fraction: float | None = 0.15
    # Codes such as `en`; other documents are dropped (needs py3langid); `zh` covers `wuu`; null: off.
    languages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.min_chars < 1:
            raise ValueError(f"min_chars must be at least 1, got {self.min_chars}")
        if self.max_chars < self.min_chars:
            raise ValueError(f"max_chars must be at least min_chars ({self.min_chars}), got {self.max_chars}")
        check_phrases(self.blocked_phrases)
        if self.max_symbol_to_word_ratio is not None and self.max_symbol_to_word_ratio < 0:
            raise ValueError(
                f"max_symbol_to_word_ratio must be at least 0, got {self.max_symbol_to_word_ratio}"
            )
        for key in ("duplicate_line", "duplicate_line_char", "top_ngram_char", "duplicate_ngram_char"):
            value = getattr(self, f"max_{key}_fraction")
            if value is not None and not 0 <= value <= 1:
                raise ValueError(
                    f"max_{key}_fraction must be within 0 and 1, or null to switch it off, got {value}"
                )
        for key in ("top_ngram_words", "duplicate_ngram_words"):
            if getattr(self, key) < 1:
                raise ValueError(f"{key} must be at least 1, got {getattr(self, key)}")
        check_languages(self.languages)


def check_phrases(phrases: Sequence[str]) -> None:
    """Raises ValueError if a blocked phrase is blank: every document holds it."""
    if any(not phrase.strip() for phrase in phrases):
        raise ValueError(f"blocked_phrases must not be empty texts, got {list(phrases)}")


def check_languages(languages: Sequence[str] | None) -> None:
    """Raises ValueError if these do not look like codes of languages; `classifier` knows the codes."""
    if languages is not None and (
        not languages or not all(code.isalpha() and code.islower() for code in languages)
    ):
        raise ValueError(f'languages must be codes such as "en", or null, got {list(languages)}')


def find_fault(text: str, config: FilterConfig) -> str:
    """The reason to drop a cleaned text, or "" to keep it. `languages` is judged elsewhere, last."""
    if len(text) < config.min_chars:
        return "too_short"
    if len(text) > config.max_chars:
        return "too_long"
    if config.blocked_phrases:
        lowered = text.lower()
        if any(phrase.lower() in lowered for phrase in config.blocked_phrases):
            return "blocked_phrase"
    words = text.split()
    if _has_many_symbols(text, words, config.max_symbol_to_word_ratio):
        return "symbol_to_word_ratio"
    return _find_repetition(text, words, config)


def _has_many_symbols(text: str, words: list[str], ratio: float | None) -> bool:
    if ratio is None or (num_symbols := sum(map(text.count, SYMBOLS))) <= ratio * len(words):
        return False
    return num_symbols > ratio * len(split_words(text))  # slower, and never fewer words


def _find_repetition(text: str, words: list[str], config: FilterConfig) -> str:
    line_share, char_share = duplicate_line_fractions(text)
    limit = config.max_duplicate_line_fraction
    if limit is not None and line_share > limit:
        return "duplicate_lines"
    limit = config.max_duplicate_line_char_fraction
    if limit is not None and char_share > limit:
        return "duplicate_line_chars"
    limit = config.max_top_ngram_char_fraction
    if limit is not None and top_ngram_char_fraction(words, config.top_ngram_words) > limit:
        return "top_ngram"
    limit = config.max_duplicate_ngram_char_fraction
    if limit is not None and duplicate_ngram_char_fraction(words, config.duplicate_ngram_words) > limit:
        return "duplicate_ngrams"
    return ""


def duplicate_line_fractions(text: str) -> tuple[float, float]:
    """The share of lines that repeat an earlier line, and of characters in them, without empty lines."""
    lines = [line for line in (line.strip() for line in text.split("\n")) if line]
    if not lines:
        return 0.0, 0.0
    repeats = [(line, count - 1) for line, count in Counter(lines).items() if count > 1]
    repeated_lines = sum(count for _, count in repeats)
    repeated_chars = sum(len(line) * count for line, count in repeats)
    return repeated_lines / len(lines), repeated_chars / sum(map(len, lines))


def top_ngram_char_fraction(words: list[str], size: int) -> float:
    """The share of all words' characters in the most frequent n-gram of `size` words; 0 if none repeats."""
    if len(words) < size:
        return 0.0
    counts = Counter(zip(*(words[start:] for start in range(size)), strict=False))
    most = max(counts.values())
    if most == 1:
        return 0.0
    longest = max(sum(map(len, ngram)) for ngram, count in counts.items() if count == most)
    return min(1.0, longest * most / sum(map(len, words)))  # overlapping n-grams ("a a a") would count twice


def duplicate_ngram_char_fraction(words: list[str], size: int) -> float:
    """The share of all words' characters in repeated n-grams of `size` words, overlaps counted once."""
    ngrams = list(zip(*(words[start:] for start in range(size)), strict=False))
    if len(set(ngrams)) == len(ngrams):
        return 0.0
    seen: set[tuple[str, ...]] = set()
    covered, num_chars = 0, 0  # `covered`: words before this index are counted already
    for start, ngram in enumerate(ngrams):
        if ngram in seen:
            num_chars += sum(map(len, words[max(start, covered) : start + size]))
            covered = start + size
        seen.add(ngram)
    return num_chars / sum(map(len, words))


@functools.cache
def classifier(languages: tuple[str, ...]) -> Callable[[str], str]:
    """text -> the code of its language, the likeliest among all that py3langid knows.

    It goes by letters and not by words, so scripts without spaces need nothing else. But Wu (`wuu`) counts as
    Chinese (`zh`), unless it is among `languages`.

    Raises:
        UserError: py3langid is not installed, or does not know one of `languages`.
    """
    try:
        py3langid = importlib.import_module("py3langid")
    except ModuleNotFoundError as error:
        raise UserError(
            "languages",
            "must be null where py3langid is not installed",
            got=list(languages),
            remedy="run: pip install 'lumi-train[langid]'",
        ) from error
    known = {str(code) for code, _ in py3langid.rank("")}
    unknown = sorted(set(languages) - known)
    if unknown:
        raise UserError("languages", f"must be among {', '.join(sorted(known))}", got=", ".join(unknown))
    same = {} if "wuu" in languages else {"wuu": "zh"}  # it takes much of written Chinese for Wu

    def classify(text: str) -> str:
        code = str(py3langid.classify(text[:LANGUAGE_CHARS])[0])
        return same.get(code, code)

    return classify
