"""The work on one batch that needs no other batch: cleaning, filters and fingerprints. It runs in worker processes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.deduplication import DeduplicationConfig, Fingerprint, fingerprint
from lumi.corpus.filters import FilterConfig, find_fault
from lumi.corpus.reading import Record

BATCH_DOCUMENTS = 1024
BATCH_CHARS = 4_000_000


class Recipe(NamedTuple):
    """Everything that decides what becomes of a record by itself."""

    cleaning: CleaningConfig
    filters: FilterConfig
    deduplication: DeduplicationConfig


class Outcome(NamedTuple):
    """What became of one record: `text` and `fingerprint`, or None with the reason (and the place, if it was malformed)."""

    text: str | None
    fingerprint: Fingerprint | None
    reason: str = ""
    detail: str = ""


def process_batch(recipe: Recipe, records: list[Record]) -> list[Outcome]:
    """Clean, filter and fingerprint; one outcome per record, in order."""
    outcomes: list[Outcome | None] = []
    texts: list[str] = []
    for text, reason, detail in records:
        if text is not None:
            text, reason = _process(text, recipe)
        if reason:
            outcomes.append(Outcome(None, None, reason, detail))
        else:
            assert text is not None
            outcomes.append(None)
            texts.append(text)
    kept = iter(zip(texts, fingerprint(texts, recipe.deduplication), strict=True))
    return [Outcome(*next(kept)) if outcome is None else outcome for outcome in outcomes]


def _process(text: str, recipe: Recipe) -> tuple[str, str]:
    if len(text) > recipe.filters.max_chars:  # before any work: this is what makes a huge document cheap
        return "", "too_long"
    text = clean_text(text, recipe.cleaning)
    if not text or text.isspace():
        return "", "empty"
    return text, find_fault(text, recipe.filters)


def make_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Batches of BATCH_DOCUMENTS records or about BATCH_CHARS characters, whichever comes first."""
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += len(record.text or "")
        if len(batch) >= BATCH_DOCUMENTS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
