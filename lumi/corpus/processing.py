"""The work on a batch that needs no other batch: cleaning, filters, decontamination, fingerprints.

Worker processes run it.
"""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lumi.chat.messages import Conversation, contents
from lumi.chat.pairs import Pair
from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.conversation_filters import (
    ConversationFilterConfig,
    clean_conversation,
    clean_pair,
    find_conversation_fault,
    find_pair_fault,
)
from lumi.corpus.counts import SHARES_TEXT_WITH
from lumi.corpus.deduplication import DeduplicationConfig, Fingerprint, fingerprint
from lumi.corpus.documents import Document, Record, count_chars, text_of
from lumi.corpus.filters import FilterConfig, find_fault
from lumi.corpus.overlaps import Overlaps

BATCH_DOCUMENTS = 1024
BATCH_CHARS = 4_000_000


class RecordRules(NamedTuple):
    """The rules for a single record; the filters judge texts, or conversations and pairs.

    `overlaps`: finds the text of evaluation sets; None: the corpus is not decontaminated.
    """

    cleaning: CleaningConfig
    filters: FilterConfig | ConversationFilterConfig
    deduplication: DeduplicationConfig
    overlaps: Overlaps | None = None


class Outcome(NamedTuple):
    """What became of one record: the cleaned document, or None with the reason; `detail` as in `Record`.

    `num_bytes`: the UTF-8 of its text (of a conversation, of its contents). `shortened`: messages were left
    out. `unused`: as in `Record`.
    """

    document: Document | None
    fingerprint: Fingerprint | None
    num_bytes: int = 0
    reason: str = ""
    detail: str = ""
    shortened: bool = False
    unused: tuple[str, ...] = ()


def process_batch(rules: RecordRules, records: list[Record]) -> list[Outcome]:
    """Clean, filter, decontaminate and fingerprint; one outcome per record, in order."""
    outcomes = [_process(record, rules) for record in records]
    kept = [outcome.document for outcome in outcomes if outcome.document is not None]
    fingerprints = iter(fingerprint(kept, rules.deduplication))
    return [
        outcome if outcome.document is None else outcome._replace(fingerprint=next(fingerprints))
        for outcome in outcomes
    ]


def _process(record: Record, rules: RecordRules) -> Outcome:
    """The outcome without its fingerprint."""
    outcome = _decontaminate(_judge(record, rules), rules.overlaps)
    return outcome._replace(unused=record.unused) if record.unused else outcome


def _decontaminate(outcome: Outcome, overlaps: Overlaps | None) -> Outcome:
    if outcome.document is None or overlaps is None:
        return outcome
    name = overlaps.find(text_of(outcome.document))
    return _drop(SHARES_TEXT_WITH + name) if name else outcome


def _judge(record: Record, rules: RecordRules) -> Outcome:
    document, filters = record.document, rules.filters
    if document is None:
        return _drop(record.reason, record.detail)
    if count_chars(document) > filters.max_chars:  # before any work, so that a huge document costs nothing
        return _drop("too_long")
    if isinstance(document, str):
        assert isinstance(filters, FilterConfig)
        return _process_text(document, rules.cleaning, filters)
    assert isinstance(filters, ConversationFilterConfig)
    if isinstance(document, Pair):
        return _process_pair(document, rules.cleaning, filters)
    return _process_conversation(document, rules.cleaning, filters)


def _process_text(text: str, cleaning: CleaningConfig, filters: FilterConfig) -> Outcome:
    text = clean_text(text, cleaning)
    reason = "empty" if not text or text.isspace() else find_fault(text, filters)
    return _drop(reason) if reason else Outcome(text, None, len(text.encode()))


def _process_conversation(
    original: Conversation, cleaning: CleaningConfig, filters: ConversationFilterConfig
) -> Outcome:
    messages = clean_conversation(original, cleaning)
    reason = find_conversation_fault(messages, filters)
    if reason:
        return _drop(reason)
    shortened = len(messages) < len(original)
    return Outcome(messages, None, len(contents(messages).encode()), shortened=shortened)


def _process_pair(original: Pair, cleaning: CleaningConfig, filters: ConversationFilterConfig) -> Outcome:
    pair = clean_pair(original, cleaning)
    reason = find_pair_fault(pair, filters)
    if reason:
        return _drop(reason)
    shortened = len(pair.messages) < len(original.messages)
    return Outcome(pair, None, len(text_of(pair).encode()), shortened=shortened)


def _drop(reason: str, detail: str = "") -> Outcome:
    return Outcome(None, None, reason=reason, detail=detail)


def make_batches(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Batches of BATCH_DOCUMENTS records or about BATCH_CHARS characters, whichever comes first."""
    batch: list[Record] = []
    num_chars = 0
    for record in records:
        batch.append(record)
        num_chars += 0 if record.document is None else count_chars(record.document)
        if len(batch) >= BATCH_DOCUMENTS or num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch
