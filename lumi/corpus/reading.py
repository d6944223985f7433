"""Sources -> records in a fixed order: each is a text or a conversation, or the reason why there is none."""

import contextlib
import hashlib
import json
import math
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

from lumi.chat.messages import MalformedConversation, is_empty
from lumi.config import UserError
from lumi.corpus.conversations import read_string
from lumi.corpus.documents import Attribution, Document, Record, to_plain
from lumi.corpus.oasst import OasstMessagesFormat
from lumi.corpus.python_docs import read_python_docs
from lumi.corpus.python_questions import read_questions
from lumi.corpus.raw_records import Piece, RawRecord, read_pieces
from lumi.corpus.sources import (
    CsvSource,
    HubSource,
    JsonlSource,
    JsonSource,
    ParquetSource,
    PythonDocsSource,
    PythonQuestionsSource,
    RecordSource,
    Source,
    TextSource,
)


class OpenSource(NamedTuple):
    """The records of a source, and facts about it that belong in the manifest."""

    facts: dict[str, Any]
    records: Iterator[Record]


def open_source(source: Source, max_chars: int, skip: int = 0) -> OpenSource:
    """Begin to read a source after its first `skip` records.

    A piece far longer than `max_chars` characters is never held in memory.

    Raises:
        UserError: a path matches no file, a file cannot be read, or the hub cannot be reached.
    """
    opened = _open(source, max_chars, skip)
    if source.sample_fraction is None:
        return opened
    return opened._replace(records=_sample(opened.records, source.sample_fraction))


def _open(source: Source, max_chars: int, skip: int) -> OpenSource:
    if isinstance(source, PythonDocsSource):
        facts, documents = read_python_docs(source.packages)
        return OpenSource(facts, map(Record, islice(documents, skip, None)))
    if isinstance(source, PythonQuestionsSource):
        facts, answers = read_questions(
            source.packages, source.modules, source.held_out_fraction, source.max_answer_chars
        )
        records = (Record(None, found) if isinstance(found, str) else Record(found) for found in answers)
        return OpenSource(facts, islice(records, skip, None))
    return OpenSource({}, _read_records(source, max_chars, skip))


def _read_records(
    source: HubSource | JsonlSource | JsonSource | ParquetSource | CsvSource | TextSource,
    max_chars: int,
    skip: int,
) -> Iterator[Record]:
    try:
        if isinstance(source, RecordSource) and isinstance(source.conversation, OasstMessagesFormat):
            # A record is a tree of many pieces: all of them must be read before any tree can be skipped.
            trees = _join_trees(read_pieces(source, max_chars=max_chars), source.conversation)
            pieces: Iterator[Piece] = islice(trees, skip, None)
        else:
            pieces = read_pieces(source, max_chars=max_chars, skip=skip)
        records = (piece if isinstance(piece, Record) else _interpret(piece, source) for piece in pieces)
        yield from _name_once(records)
    except UserError as error:
        remedy = error.remedy
        if isinstance(source, HubSource) and remedy:
            remedy += ", and run again with --use-cache"
        raise error.within(f"source {source.name!r}").replace(remedy=remedy) from error


def _interpret(raw: RawRecord, source: Source) -> Record:
    assert isinstance(source, RecordSource)
    fields, format = raw.fields, source.conversation
    if format is None:
        unused = [name for name, value in fields.items() if name != source.text_field and not is_empty(value)]
    else:
        unused = format.unused(fields)
    unused = [name for name in unused if name not in source.more_fields]
    try:
        document = read_string(fields, source.text_field) if format is None else format.read(fields)
        attribution = Attribution(
            *(_read_label(fields, name) for name in (source.license_field, source.url_field))
        )
        reason = "low_score" if _is_low(fields, source) else ""
        return Record(document, reason, unused=(*unused, *raw.unread), attribution=attribution)
    except MalformedConversation as finding:
        detail = f"{raw.place}: {finding}" if str(finding) else ""
        return Record(None, finding.reason, detail, (*unused, *raw.unread))


def _read_label(fields: dict[str, Any], name: str | None) -> str | None:
    """A text, or texts in a list; "" if there is none. None if no field is named."""
    if name is None:
        return None
    value = fields.get(name)
    labels = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(label, str) for label in labels):
        raise MalformedConversation(
            "wrong_type", f"{name!r} must be a text or a list of texts, got {value!r}"
        )
    return ", ".join(label.strip() for label in labels).encode("utf-8", "replace").decode()


def _is_low(fields: dict[str, Any], source: RecordSource) -> bool:
    """Whether the score of a record is below the source's limit."""
    if source.score_field is None or source.min_score is None:
        return False
    value = fields.get(source.score_field)
    score = float("nan")
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        with contextlib.suppress(ValueError, OverflowError):
            score = float(value)  # a text, as in CSV
    if math.isnan(score):
        raise MalformedConversation(
            "no_score", f"{source.score_field!r} must be a number, got {value!r}"[:300]
        )
    return score < source.min_score


def _sample(records: Iterable[Record], fraction: float) -> Iterator[Record]:
    """The same records, but of the documents only those that a hash picks."""
    for record in records:
        if record.document is not None and _place(record.document) >= fraction:
            record = record._replace(document=None, reason="not_sampled")
        yield record


def _place(document: Document) -> float:
    """A number in [0, 1) by the bytes of a document alone. No other choice by a hash depends on it."""
    data = json.dumps(to_plain(document)).encode()  # ASCII, also of lone surrogates
    rank = hashlib.blake2b(data, digest_size=6, person=b"lumi sample").digest()
    return int.from_bytes(rank, "big") / (1 << 48)


def _name_once(records: Iterable[Record]) -> Iterator[Record]:
    """The same records, each unused field only with the first that has it."""
    named: set[str] = set()
    for record in records:
        if record.unused:
            unused = tuple(name for name in record.unused if name not in named)
            named.update(unused)
            record = record._replace(unused=unused)
        yield record


def _join_trees(pieces: Iterable[Piece], conversation: OasstMessagesFormat) -> Iterator[Piece]:
    """The rows of each tree as one record with the field "rows", in the order in which the trees begin.

    Pieces that are no row of a tree come first.
    """
    trees: dict[str, RawRecord] = {}
    for piece in pieces:
        if isinstance(piece, Record):
            yield piece
            continue
        identity = piece.fields.get("message_tree_id")
        if not isinstance(identity, str):
            yield RawRecord({"rows": [piece.fields]}, piece.place)
            continue
        known = conversation.required + conversation.optional
        row = {name: piece.fields[name] for name in known if name in piece.fields}
        tree = trees.get(identity, RawRecord({"rows": []}, piece.place))
        tree.fields["rows"].append(row)
        unread = dict.fromkeys((*tree.unread, *conversation.unused(piece.fields), *piece.unread))
        trees[identity] = tree._replace(unread=tuple(unread))
    while trees:  # each is given up as it goes: all of them are held in memory
        yield trees.pop(next(iter(trees)))
