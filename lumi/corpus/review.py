"""What people look at before they trust a filter: lengths, languages, examples of documents.

The examples of a reason are those with the lowest hashes. So the same documents give the same examples,
however they were cut into batches and tasks, and no more than these are held in memory.
"""

import bisect
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple

from lumi.chat.messages import said
from lumi.corpus.documents import Document, count_chars, messages_of

NUM_EXAMPLES = 10  # of each reason, and of what is kept
EXCERPT_CHARS = 1_000


class Glimpse(NamedTuple):
    """What a review needs of a document after it is gone.

    `num_chars`: its characters; 0: there was none. `rank`: the hash of its beginning. `excerpt`: its
    beginning, of a dropped document that may become an example. `language`: where it was looked for.
    """

    num_chars: int = 0
    rank: int = 0
    excerpt: str = ""
    language: str = ""


def glimpse_of(document: Document, excerpt: str, language: str = "") -> Glimpse:
    """The glimpse of a document whose beginning is `excerpt`."""
    return Glimpse(count_chars(document), rank_of(excerpt), excerpt, language)


def excerpt_of(document: Document) -> str:
    """The beginning of a text, or of what is said in the messages, each after its role."""
    if isinstance(document, str):
        return _cut(document)
    pieces = (
        f"{message.role}: {text[: EXCERPT_CHARS + 1]}"
        for message in messages_of(document)
        for text in said(message)
    )
    return _cut("\n".join(islice(pieces, EXCERPT_CHARS)))


def _cut(text: str) -> str:
    return text if len(text) <= EXCERPT_CHARS else text[:EXCERPT_CHARS] + " …"


def rank_of(excerpt: str) -> int:
    """64 bits that decide whether an excerpt becomes an example."""
    data = excerpt.encode("utf-8", "replace")
    return int.from_bytes(hashlib.blake2b(data, digest_size=8, person=b"lumi example").digest(), "little")


class Example(NamedTuple):
    """An excerpt, and the name of its source."""

    source: str
    text: str


class Lowest:
    """The examples with the lowest ranks, one for each rank."""

    def __init__(self) -> None:
        self._found: list[tuple[int, Example]] = []

    def wants(self, rank: int) -> bool:
        """Whether an example of this rank is among the lowest so far."""
        if len(self._found) == NUM_EXAMPLES and rank >= self._found[-1][0]:
            return False
        return all(rank != other for other, _ in self._found)

    def add(self, rank: int, example: Example) -> None:
        """Take an example that is wanted."""
        bisect.insort(self._found, (rank, example))
        del self._found[NUM_EXAMPLES:]

    def __iter__(self) -> Iterator[Example]:
        return (example for _, example in self._found)


def wanted(glimpses: Iterable[tuple[str, Glimpse]]) -> Iterator[bool]:
    """For each (reason, glimpse) whether it is among the lowest of its reason up to there.

    Only these can be examples of all documents, or of those up to any place: their number grows as the
    logarithm of all.
    """
    lowest: defaultdict[str, Lowest] = defaultdict(Lowest)
    for reason, glimpse in glimpses:
        if is_wanted := bool(glimpse.excerpt.strip()) and lowest[reason].wants(glimpse.rank):
            lowest[reason].add(glimpse.rank, Example("", ""))
        yield is_wanted


class Bar(NamedTuple):
    """A line of a histogram: how many documents are kept and dropped."""

    label: str
    kept: int
    dropped: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.kept + self.dropped


class Review:
    """Takes documents in their order, each with its glimpse and the reason to drop it, or ""."""

    def __init__(self) -> None:
        self._lengths: Counter[tuple[int, bool]] = Counter()
        self._languages: Counter[tuple[str, bool]] = Counter()
        self._examples: defaultdict[str, Lowest] = defaultdict(Lowest)

    def add(
        self, source: str, reason: str, glimpse: Glimpse, detail: str, read: Callable[[], Document | None]
    ) -> None:
        """Take the next document of a source.

        Args:
            detail: what is wrong with a record that gave no document.
            read: gives the document, if it passed the filters. It is called for few of them.
        """
        if glimpse.num_chars:
            self._lengths[glimpse.num_chars.bit_length(), not reason] += 1
        if glimpse.language:
            self._languages[glimpse.language, not reason] += 1
        examples, rank = self._examples[reason], glimpse.rank or rank_of(detail)
        if not examples.wants(rank):
            return
        text = glimpse.excerpt or detail
        if not text and (document := read()) is not None:
            text = excerpt_of(document)
        if text.strip():
            examples.add(rank, Example(source, text))

    def examples(self, reason: str) -> list[Example]:
        """Those of a reason; of "", those that are kept."""
        return list(self._examples[reason])

    @property
    def lengths(self) -> list[Bar]:
        """Documents by their characters, between powers of two."""
        found = {size for size, _ in self._lengths}
        sizes = range(min(found), max(found) + 1) if found else ()
        return [_bar(self._lengths, size, f"{1 << size - 1:,} to {(1 << size) - 1:,}") for size in sizes]

    @property
    def languages(self) -> list[Bar]:
        """Documents by their languages, the most frequent first."""
        bars = [_bar(self._languages, code, code) for code in sorted({code for code, _ in self._languages})]
        return sorted(bars, key=lambda bar: -bar.total)


def _bar(counts: Mapping[Any, int], value: object, label: str) -> Bar:
    return Bar(label, counts[value, True], counts[value, False])
