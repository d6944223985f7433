"""Documents -> arrays of tokens, in threads.

A document is a text, a conversation or a pair. Every token of a text is trained; a chat template lays out
and masks a conversation. A pair becomes two documents, the chosen conversation and then the rejected one, in
which the answers alone are trained. SentencePiece releases the interpreter's lock while it encodes (since
0.2.3; before, the threads took turns).
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lumi.chat.foreign_rendering import ForeignTemplate
from lumi.chat.foreign_template import TemplateRefusal
from lumi.chat.messages import Conversation, Message, canonical
from lumi.chat.pairs import Pair, render_pair
from lumi.chat.rendering import render_documents
from lumi.chat.templates import Template
from lumi.chat.token_writer import Rendered
from lumi.corpus.documents import Document, count_chars
from lumi.data.store_manifest import Counts, token_dtype
from lumi.host.text import utf8
from lumi.host.workers import Workers
from lumi.tokenizer.tokenizer import Tokenizer

TASK_CHARACTERS = 1 << 20  # about 0.2 s of work: long beside the hand-over, short beside a run
_RANKS = 2**64


class Documents(NamedTuple):
    """Texts, conversations or pairs, and the name of the source of each."""

    documents: Sequence[Document]
    sources: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class EncodingSettings:
    """What decides a document's tokens and its split.

    Args:
        validation_fraction: share of the documents for validation, 0 (none) to 1 (all).
        template, max_tokens: for conversations, as in `lumi.chat.rendering.render`, and for pairs, as in
            `lumi.chat.pairs.render_pair`.
    """

    tokenizer: Tokenizer
    validation_fraction: float
    template: Template | ForeignTemplate | None = None
    max_tokens: int | None = None


class Encoded(NamedTuple):
    """Documents of one split, in order.

    Attributes:
        tokens: (sum of lengths,) uint16 or uint32; a text is BOS if the tokenizer puts one first, its ids,
            EOS.
        lengths: (documents,) int64.
        mask: (sum of lengths,) bool, which tokens are trained. None for texts: all.
        counts: per source.
        lowest_rank: the lowest of the documents' hashes, 0 to 2**64 - 1.
        dropped: conversations without a trained token, those that the template refuses, and pairs, by reason.
        truncated: number of conversations that lost answers to `max_tokens`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    counts: dict[str, Counts]
    lowest_rank: int
    dropped: dict[str, int]
    truncated: int


def split_of(data: bytes, validation_fraction: float) -> tuple[str, int]:
    """The split of a document, and its rank: the first 8 bytes of the SHA-256 of its content.

    Documents of rank < validation_fraction * 2**64 are for validation. So equal documents share a split.
    """
    rank = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return ("validation" if rank < validation_fraction * _RANKS else "train"), rank


def key_of(document: Conversation | Pair) -> Conversation:
    """What decides the split: the conversation, or the question of a pair, so that its pairs share one."""
    return document.prompt if isinstance(document, Pair) else document


def encode_documents(settings: EncodingSettings, task: Documents) -> dict[str, Encoded]:
    """Encode each document and put it into its split.

    Raises:
        UserError: a document has a lone surrogate, or the tokenizer lacks a token of the template.
    """
    splits = {"train": _GrowingSplit(), "validation": _GrowingSplit()}
    tokenizer = settings.tokenizer
    texts = [document for document in task.documents if isinstance(document, str)]
    ids_of_texts = iter(tokenizer.encode_batch(texts))
    for document, source in zip(task.documents, task.sources, strict=True):
        if isinstance(document, str):
            data = utf8(document)
            name, rank = split_of(data, settings.validation_fraction)
            ids = [*tokenizer.begin_ids, *next(ids_of_texts), tokenizer.eos_id]
            splits[name].add(ids, source, len(data), rank)
        else:
            name, rank = split_of(canonical(key_of(document)), settings.validation_fraction)
            try:
                splits[name].add_rendered(settings, document, source, rank)
            except TemplateRefusal as refusal:
                splits[name].dropped[f"refused_by_template: {refusal.expectation}"] += 1
    dtype = token_dtype(tokenizer.vocab_size)
    return {name: split.finish(dtype) for name, split in splits.items() if split.lengths or split.dropped}


@dataclass
class _GrowingSplit:
    """The documents of one split as they come; the fields are those of Encoded."""

    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    counts: dict[str, Counts] = field(default_factory=dict)
    lowest_rank: int = _RANKS
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0

    def add(self, ids: list[int], source: str, num_bytes: int, rank: int) -> None:
        self.tokens += ids
        self.lengths.append(len(ids))
        count = Counts(documents=1, tokens=len(ids), bytes=num_bytes)
        self.counts[source] = self.counts.get(source, Counts()) + count
        self.lowest_rank = min(self.lowest_rank, rank)

    def add_rendered(
        self, settings: EncodingSettings, document: Conversation | Pair, source: str, rank: int
    ) -> None:
        template, max_tokens = settings.template, settings.max_tokens
        assert template is not None
        if isinstance(document, Pair):
            sides = render_pair(settings.tokenizer, template, document, max_tokens)
            self.add_pair(sides, document, source, rank)
        else:
            documents = render_documents(settings.tokenizer, template, document, max_tokens)
            self.add_conversation(documents, document, source, rank)

    def add_conversation(
        self, documents: Sequence[Rendered], conversation: Conversation, source: str, rank: int
    ) -> None:
        answers = [index for index, message in enumerate(conversation) if message.role == "assistant"]
        if not documents:
            self.dropped["no_answer_within_max_tokens" if answers else "no_answer"] += 1
            return
        start = 0
        for ids, mask, num_messages in documents:
            trained = [index for index in answers if start <= index < num_messages]
            self.mask += mask
            self.add(ids, source, _answer_bytes([conversation[index] for index in trained]), rank)
            start = num_messages
        if answers[-1] >= start:
            self.truncated += 1

    def add_pair(self, sides: tuple[Rendered, Rendered] | None, pair: Pair, source: str, rank: int) -> None:
        if sides is None:
            self.dropped["pair_beyond_max_tokens"] += 1
            return
        for rendered, answer in zip(sides, (pair.chosen, pair.rejected), strict=True):
            self.mask += rendered.mask
            self.add(rendered.ids, source, _answer_bytes(answer), rank)

    def finish(self, dtype: np.dtype) -> Encoded:
        tokens, lengths = np.array(self.tokens, dtype=dtype), np.array(self.lengths, dtype=np.int64)
        mask = np.array(self.mask, dtype=bool) if self.mask else None
        return Encoded(tokens, lengths, mask, self.counts, self.lowest_rank, self.dropped, self.truncated)


def encode_all(
    batches: Iterable[Documents], settings: EncodingSettings, num_workers: int
) -> Iterator[dict[str, Encoded]]:
    """Encode documents in their order. What comes out does not depend on `num_workers`.

    Args:
        batches: of any size; `make_tasks` deals them out again.
        num_workers: threads, at least 1; at most `num_workers` + 2 tasks are in memory.

    Raises:
        UserError: as `encode_documents`.
    """
    with Workers(encode_documents, settings, num_workers, threads=True) as workers:
        yield from workers.map(make_tasks(batches))


def make_tasks(batches: Iterable[Documents]) -> Iterator[Documents]:
    """The same documents in tasks of at least TASK_CHARACTERS characters; the last one may be smaller."""
    documents: list[Document] = []
    sources: list[str] = []
    size = 0
    for batch in batches:
        for document, source in zip(batch.documents, batch.sources, strict=True):
            documents.append(document)
            sources.append(source)
            size += count_chars(document)
            if size >= TASK_CHARACTERS:
                yield Documents(documents, sources)
                documents, sources, size = [], [], 0
    if documents:
        yield Documents(documents, sources)


def _answer_bytes(messages: Sequence[Message]) -> int:
    return sum(len(utf8(message.content)) for message in messages if message.role == "assistant")
