"""The work on one batch that needs no other batch: cleaning, filters and fingerprints. It runs in worker processes."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.conversation_filters import (
    ConversationFilterConfig,
    clean_conversation,
    find_conversation_fault,
)
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

    `text` is that of `Record`, `num_bytes` the UTF-8 of what is said in it; `shortened`: messages of a conversation were left out.
    """

    text: str | None
    fingerprint: Fingerprint | None
    num_bytes: int = 0
    reason: str = ""
    detail: str = ""
    shortened: bool = False


def process_batch(recipe: Recipe, records: list[Record]) -> list[Outcome]:
    """Clean, filter and fingerprint; one outcome per record, in order."""
    outcomes: list[Outcome] = []
    texts: list[str] = []
    answers: list[str] = []
    for record in records:
        outcome, said, answered = _process(record, recipe)
        outcomes.append(outcome)
        if outcome.text is not None:
            texts.append(said)
            answers.append(answered)
    holds_texts = isinstance(recipe.filters, FilterConfig)
    fingerprints = iter(fingerprint(texts, recipe.deduplication, None if holds_texts else answers))
    return [
        outcome if outcome.text is None else outcome._replace(fingerprint=next(fingerprints))
        for outcome in outcomes
    ]


def _process(record: Record, recipe: Recipe) -> tuple[Outcome, str, str]:
    """The outcome, without its fingerprint, what is said in it (the text, or the contents of the conversation), and the answers."""
    if record.text is None:
        return Outcome(None, None, 0, record.reason, record.detail), "", ""
    if isinstance(recipe.filters, FilterConfig):
        return _process_text(record.text, recipe.cleaning, recipe.filters)
    return _process_conversation(record.text, recipe.cleaning, recipe.filters)


def _process_text(text: str, cleaning: CleaningConfig, filters: FilterConfig) -> tuple[Outcome, str, str]:
    if len(text) > filters.max_chars:  # before any work: this is what makes a huge document cheap
        return _drop("too_long")
    text = clean_text(text, cleaning)
    reason = "empty" if not text or text.isspace() else find_fault(text, filters)
    return _drop(reason) if reason else (Outcome(text, None, len(text.encode())), text, "")


def _process_conversation(
    text: str, cleaning: CleaningConfig, filters: ConversationFilterConfig
) -> tuple[Outcome, str, str]:
    original = unpack(text)
    if sum(len(message.content) for message in original) > filters.max_chars:
        return _drop("too_long")
    messages = clean_conversation(original, cleaning)
    reason = find_conversation_fault(messages, filters)
    if reason:
        return _drop(reason)
    said = contents(messages)
    answers = contents([message for message in messages if message.role == "assistant"])
    return (
        Outcome(pack(messages), None, len(said.encode()), shortened=len(messages) < len(original)),
        said,
        answers,
    )


def _drop(reason: str) -> tuple[Outcome, str, str]:
    return Outcome(None, None, 0, reason), "", ""


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
