"""The work on a batch that needs no other batch: cleaning, filters, decontamination, fingerprints.

Worker processes run it.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from lumi.chat.messages import contents
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
from lumi.corpus.documents import Attribution, Document, Record, count_chars, messages_of, text_of
from lumi.corpus.filters import FilterConfig, classifier, find_fault
from lumi.corpus.overlaps import Overlaps
from lumi.corpus.review import Glimpse, excerpt_of, glimpse_of, wanted
from lumi.corpus.scrubbing import DETAILS

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
    out. `unused`, `attribution`: as in `Record`. `replaced`: how many
    personal details of each of DETAILS. `glimpse`: what the report needs.
    """

    document: Document | None
    fingerprint: Fingerprint | None
    num_bytes: int = 0
    reason: str = ""
    detail: str = ""
    shortened: bool = False
    unused: tuple[str, ...] = ()
    replaced: tuple[int, ...] = (0,) * len(DETAILS)
    attribution: Attribution = Attribution()
    glimpse: Glimpse = Glimpse()


def process_batch(rules: RecordRules, records: list[Record]) -> list[Outcome]:
    """Clean, filter, decontaminate and fingerprint; one outcome per record, in order."""
    outcomes = [_judge(record, rules)._replace(unused=record.unused) for record in records]
    kept = [outcome.document for outcome in outcomes if outcome.document is not None]
    fingerprints = iter(fingerprint(kept, rules.deduplication))
    examples = wanted((outcome.reason, outcome.glimpse) for outcome in outcomes)
    return [
        outcome._replace(
            fingerprint=None if outcome.document is None else next(fingerprints),
            glimpse=outcome.glimpse if is_example else outcome.glimpse._replace(excerpt=""),
        )
        for outcome, is_example in zip(outcomes, examples, strict=True)
    ]


def _judge(record: Record, rules: RecordRules) -> Outcome:
    """The outcome without its fingerprint and unused fields."""
    document, filters = record.document, rules.filters
    if document is None:
        return Outcome(None, None, reason=record.reason, detail=record.detail)
    if record.reason or count_chars(document) > filters.max_chars:  # a huge document costs no work
        excerpt = clean_text(excerpt_of(document), rules.cleaning)
        reason = record.reason or "too_long"
        return Outcome(None, None, reason=reason, glimpse=glimpse_of(document, excerpt))
    replaced: Counter[str] = Counter()
    cleaned, language = _clean(document, rules.cleaning, replaced), ""
    reason = _find_fault(cleaned, filters)
    if not reason and filters.languages is not None:
        language = _find_language(cleaned, filters.languages)
        reason = "" if language in filters.languages else "language"
    if not reason and rules.overlaps is not None and (name := rules.overlaps.find(text_of(cleaned))):
        reason = SHARES_TEXT_WITH + name
    glimpse = glimpse_of(cleaned, excerpt_of(cleaned), language)
    if reason:
        return Outcome(None, None, reason=reason, glimpse=glimpse)
    num_bytes, glimpse = len(text_of(cleaned).encode()), glimpse._replace(excerpt="")
    return Outcome(
        cleaned,
        None,
        num_bytes,
        shortened=_is_shortened(document, cleaned),
        replaced=tuple(replaced[detail] for detail in DETAILS),
        attribution=record.attribution,
        glimpse=glimpse,
    )


def _clean(document: Document, config: CleaningConfig, replaced: Counter[str]) -> Document:
    if isinstance(document, str):
        return clean_text(document, config, replaced)
    if isinstance(document, Pair):
        return clean_pair(document, config, replaced)
    return clean_conversation(document, config, replaced)


def _find_fault(document: Document, filters: FilterConfig | ConversationFilterConfig) -> str:
    if isinstance(document, str):
        assert isinstance(filters, FilterConfig)
        return "empty" if not document or document.isspace() else find_fault(document, filters)
    assert isinstance(filters, ConversationFilterConfig)
    if isinstance(document, Pair):
        return find_pair_fault(document, filters)
    return find_conversation_fault(document, filters)


def _find_language(document: Document, languages: tuple[str, ...]) -> str:
    """The code of a document's language; of a pair the first of its two that is none of `languages`."""
    if isinstance(document, Pair):
        texts = [contents((*document.prompt, *answer)) for answer in (document.chosen, document.rejected)]
    else:
        texts = [text_of(document)]
    found = list(map(classifier(languages), texts))
    return next((code for code in found if code not in languages), found[0])


def _is_shortened(original: Document, cleaned: Document) -> bool:
    if isinstance(original, str) or isinstance(cleaned, str):
        return False
    return len(messages_of(cleaned)) < len(messages_of(original))


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
