"""The work on one batch that needs no other batch: cleaning, filters and fingerprints. It runs in worker processes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.conversation_filters import ConversationFilterConfig, clean_conversation, find_conversation_fault
from lumi.corpus.conversations import contents, pack, unpack
from lumi.corpus.deduplication import DeduplicationConfig, Fingerprint, fingerprint
from lumi.corpus.filters import FilterConfig, find_fault
from lumi.corpus.reading import Record

BATCH_DOCUMENTS = 1024
BATCH_CHARS = 4_000_000


class Recipe(NamedTuple):
    """Everything that decides what becomes of a record by itself; the filters say whether records are texts or conversations."""

    cleaning: CleaningConfig
    filters: FilterConfig | ConversationFilterConfig
    deduplication: DeduplicationConfig


class Outcome(NamedTuple):
    """What became of one record: what is kept of it, or None with the reason (and the place, if it was malformed).

    `text` is that of `Record`, `num_bytes` the UTF-8 of what is said in it.
    """

    text: str | None
    fingerprint: Fingerprint | None
    num_bytes: int = 0
    reason: str = ""
    detail: str = ""


def process_batch(recipe: Recipe, records: list[Record]) -> list[Outcome]:
    """Clean, filter and fingerprint; one outcome per record, in order."""
    outcomes: list[Outcome] = []
    words: list[str] = []
    for record in records:
        outcome, said = _process(record, recipe)
        outcomes.append(outcome)
        if outcome.text is not None:
            words.append(said)
    fingerprints = iter(fingerprint(words, recipe.deduplication))
    return [outcome if outcome.text is None else outcome._replace(fingerprint=next(fingerprints)) for outcome in outcomes]


def _process(record: Record, recipe: Recipe) -> tuple[Outcome, str]:
    """The outcome, without its fingerprint, and what is said in it: the text, or the contents of the conversation."""
    if record.text is None:
        return Outcome(None, None, 0, record.reason, record.detail), ""
    if isinstance(recipe.filters, FilterConfig):
        text, said, reason = _process_text(record.text, recipe.cleaning, recipe.filters)
    else:
        text, said, reason = _process_conversation(record.text, recipe.cleaning, recipe.filters)
    if reason:
        return Outcome(None, None, 0, reason), ""
    return Outcome(text, None, len(said.encode())), said


def _process_text(text: str, cleaning: CleaningConfig, filters: FilterConfig) -> tuple[str, str, str]:
    if len(text) > filters.max_chars:  # before any work: this is what makes a huge document cheap
        return "", "", "too_long"
    text = clean_text(text, cleaning)
    if not text or text.isspace():
        return "", "", "empty"
    return text, text, find_fault(text, filters)


def _process_conversation(text: str, cleaning: CleaningConfig, filters: ConversationFilterConfig) -> tuple[str, str, str]:
    messages = unpack(text)
    if sum(len(message.content) for message in messages) > filters.max_chars:
        return "", "", "too_long"
    messages = clean_conversation(messages, cleaning)
    return pack(messages), contents(messages), find_conversation_fault(messages, filters)


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
