"""Documents -> token arrays, in threads: SentencePiece encodes outside the interpreter's lock (since 0.2.3; before, one after the other).

A document is a text, every token of which is trained, or a conversation, which a chat template lays out and masks.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from lumi.chat.messages import Conversation, to_json
from lumi.chat.rendering import Rendered, Template, render
from lumi.host.text import utf8
from lumi.host.workers import Workers
from lumi.tokenizer.tokenizer import Tokenizer

TASK_CHARACTERS = 1 << 20  # a task takes some 0.2 s: long beside its hand-over, short beside a run
_RANKS = 2**64


class Documents(NamedTuple):
    """Texts or conversations, and the name of the source of each."""

    documents: Sequence[str | Conversation]
    sources: Sequence[str]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What decides the tokens of a document and its split.

    Args:
        validation_fraction: share of the documents for validation, 0 (none) to 1 (all).
        template, max_tokens: for conversations, as in `lumi.chat.rendering.render`.
    """

    tokenizer: Tokenizer
    validation_fraction: float
    template: Template | None = None
    max_tokens: int | None = None


class Encoded(NamedTuple):
    """Documents of one split, in order.

    tokens: (sum of lengths,) uint16 or uint32; a text as BOS, its ids, EOS. lengths: (documents,) int64.
    mask: (sum of lengths,) bool, which tokens are trained; None for texts: all.
    counts: per source, its documents, tokens and bytes of UTF-8 (of a conversation, of its answers).
    lowest_rank: of the documents' hashes, 0 to 2**64 - 1.
    dropped: conversations without a trained token, by reason. truncated: conversations that lost answers to `max_tokens`.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    mask: np.ndarray | None
    counts: dict[str, tuple[int, int, int]]
    lowest_rank: int
    dropped: dict[str, int]
    truncated: int


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of little-endian uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def split_of(data: bytes, validation_fraction: float) -> tuple[str, int]:
    """The split of a document, and its rank: the first 8 bytes of the SHA-256 of its content, so that equal ones share a side.

    Validation holds the documents of rank < validation_fraction * 2**64.
    """
    rank = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return ("validation" if rank < validation_fraction * _RANKS else "train"), rank


def encode_documents(recipe: Recipe, task: Documents) -> dict[str, Encoded]:
    """Encode each document and deal it to its split.

    Raises:
        UserError: a document has a lone surrogate, or the tokenizer lacks a token of the template.
    """
    splits = {"train": _Growing(), "validation": _Growing()}
    tokenizer = recipe.tokenizer
    for document, source in zip(task.documents, task.sources, strict=True):
        if isinstance(document, str):
            data = utf8(document)
            name, rank = split_of(data, recipe.validation_fraction)
            splits[name].add(
                [tokenizer.bos_id, *tokenizer.encode_utf8(data), tokenizer.eos_id], source, len(data), rank
            )
        else:
            name, rank = split_of(canonical(document), recipe.validation_fraction)
            assert recipe.template is not None
            rendered = render(tokenizer, recipe.template, document, recipe.max_tokens)
            splits[name].add_conversation(rendered, document, source, rank)
    dtype = token_dtype(tokenizer.vocab_size)
    return {name: split.finish(dtype) for name, split in splits.items() if split.lengths or split.dropped}


def canonical(conversation: Conversation) -> bytes:
    """The content of a conversation, of which its hash is taken: compact JSON in UTF-8. Raises UserError for a lone surrogate."""
    return utf8(json.dumps(to_json(conversation), ensure_ascii=False, separators=(",", ":")))


@dataclass
class _Growing:
    """The documents of one split as they come."""

    tokens: list[int] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    mask: list[bool] = field(default_factory=list)
    counts: dict[str, tuple[int, int, int]] = field(default_factory=dict)
    lowest_rank: int = _RANKS
    dropped: Counter[str] = field(default_factory=Counter)
    truncated: int = 0

    def add(self, ids: list[int], source: str, num_bytes: int, rank: int) -> None:
        self.tokens += ids
        self.lengths.append(len(ids))
        documents, tokens, total_bytes = self.counts.get(source, (0, 0, 0))
        self.counts[source] = (documents + 1, tokens + len(ids), total_bytes + num_bytes)
        self.lowest_rank = min(self.lowest_rank, rank)

    def add_conversation(
        self, rendered: Rendered | None, conversation: Conversation, source: str, rank: int
    ) -> None:
        answers = [index for index, message in enumerate(conversation) if message.role == "assistant"]
        if rendered is None:
            self.dropped["no_answer_within_max_tokens" if answers else "no_answer"] += 1
            return
        kept = [index for index in answers if index < rendered.num_messages]
        self.truncated += len(kept) < len(answers)
        self.mask += rendered.mask
        self.add(rendered.ids, source, sum(len(utf8(conversation[index].content)) for index in kept), rank)

    def finish(self, dtype: np.dtype) -> Encoded:
        tokens, lengths = np.array(self.tokens, dtype=dtype), np.array(self.lengths, dtype=np.int64)
        mask = np.array(self.mask, dtype=bool) if self.mask else None
        return Encoded(tokens, lengths, mask, self.counts, self.lowest_rank, self.dropped, self.truncated)


def encode_all(
    batches: Iterable[Documents], recipe: Recipe, num_workers: int
) -> Iterator[dict[str, Encoded]]:
    """Encode documents in their order; the documents that come out do not depend on `num_workers`.

    Args:
        batches: of any size; they are dealt out again in tasks of about 1 MB.
        num_workers: threads, at least 1; at most `num_workers` + 2 tasks are in memory.

    Raises:
        UserError: as `encode_documents`.
    """
    with Workers(encode_documents, recipe, num_workers, threads=True) as workers:
        yield from workers.map(make_tasks(batches))


def make_tasks(batches: Iterable[Documents]) -> Iterator[Documents]:
    """The same documents in tasks of at least TASK_CHARACTERS characters, the last one perhaps less."""
    documents: list[str | Conversation] = []
    sources: list[str] = []
    size = 0
    for batch in batches:
        for document, source in zip(batch.documents, batch.sources, strict=True):
            documents.append(document)
            sources.append(source)
            size += (
                len(document)
                if isinstance(document, str)
                else sum(len(message.content) for message in document)
            )
            if size >= TASK_CHARACTERS:
                yield Documents(documents, sources)
                documents, sources, size = [], [], 0
    if documents:
        yield Documents(documents, sources)
