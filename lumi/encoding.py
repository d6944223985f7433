"""Texts -> token arrays, in threads: SentencePiece encodes outside the interpreter's lock (since 0.2.3; before, one after the other)."""

import hashlib
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lumi.tokenizer import Tokenizer, utf8
from lumi.workers import Workers

TASK_CHARACTERS = 1 << 20  # a task takes some 0.2 s: long beside its hand-over, short beside a run
_RANKS = 2**64


class Texts(NamedTuple):
    """Documents and the name of the source of each."""

    texts: list[str]
    sources: list[str]


class Encoded(NamedTuple):
    """Documents of one split, in order.

    tokens: (sum of lengths,) uint16 or uint32, each document as BOS, its ids, EOS. lengths: (documents,) int64.
    counts: per source, its documents, tokens and bytes of UTF-8. lowest_rank: of the documents' hashes, 0 to 2**64 - 1.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    counts: dict[str, tuple[int, int, int]]
    lowest_rank: int


def token_dtype(vocab_size: int) -> np.dtype:
    """The smallest of little-endian uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def split_of(data: bytes, validation_fraction: float) -> tuple[str, int]:
    """The split of a document, and its rank: the first 8 bytes of the SHA-256 of its text, so that equal texts share a side.

    Validation holds the documents of rank / 2**64 < validation_fraction.
    """
    rank = int.from_bytes(hashlib.sha256(data).digest()[:8], "big")
    return ("validation" if rank / _RANKS < validation_fraction else "train"), rank


def encode_documents(recipe: tuple[Tokenizer, float], task: Texts) -> dict[str, Encoded]:
    """Encode each text with `recipe[0]` and deal the documents to the splits, a share `recipe[1]` to validation.

    Raises:
        UserError: a text has a lone surrogate.
    """
    tokenizer, validation_fraction = recipe
    dtype = token_dtype(tokenizer.vocab_size)
    tokens: dict[str, list[int]] = {"train": [], "validation": []}
    lengths: dict[str, list[int]] = {"train": [], "validation": []}
    counts: dict[str, dict[str, tuple[int, int, int]]] = {"train": {}, "validation": {}}
    lowest = dict.fromkeys(tokens, _RANKS)
    for text, source in zip(task.texts, task.sources, strict=True):
        data = utf8(text)
        split, rank = split_of(data, validation_fraction)
        ids = tokenizer.encode_utf8(data)
        tokens[split].append(tokenizer.bos_id)
        tokens[split] += ids
        tokens[split].append(tokenizer.eos_id)
        lengths[split].append(len(ids) + 2)
        documents, num_tokens, num_bytes = counts[split].get(source, (0, 0, 0))
        counts[split][source] = (documents + 1, num_tokens + len(ids) + 2, num_bytes + len(data))
        lowest[split] = min(lowest[split], rank)
    return {
        split: Encoded(np.array(tokens[split], dtype=dtype), np.array(lengths[split], dtype=np.int64), counts[split], lowest[split])
        for split in tokens
        if lengths[split]
    }


def encode_all(
    batches: Iterable[Texts], tokenizer: Tokenizer, *, validation_fraction: float, num_workers: int
) -> Iterator[dict[str, Encoded]]:
    """Encode documents in their order; the documents that come out do not depend on `num_workers`.

    Args:
        batches: texts and sources, of any size; they are dealt out again in tasks of about 1 MB.
        num_workers: threads, at least 1; at most `num_workers` + 2 tasks are in memory.

    Raises:
        UserError: a text is not valid Unicode.
    """
    with Workers(encode_documents, (tokenizer, validation_fraction), num_workers, threads=True) as workers:
        yield from workers.map(make_tasks(batches))


def make_tasks(batches: Iterable[Texts]) -> Iterator[Texts]:
    """The same documents in tasks of at least TASK_CHARACTERS characters, the last one perhaps less."""
    texts: list[str] = []
    sources: list[str] = []
    size = 0
    for batch in batches:
        for text, source in zip(batch.texts, batch.sources, strict=True):
            texts.append(text)
            sources.append(source)
            size += len(text)
            if size >= TASK_CHARACTERS:
                yield Texts(texts, sources)
                texts, sources, size = [], [], 0
    if texts:
        yield Texts(texts, sources)
