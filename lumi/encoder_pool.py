"""Texts -> token arrays, in processes of their own. Imports little, because every worker process imports it anew."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from lumi.tokenizer import Tokenizer, utf8
from lumi.workers import Workers

TASK_CHARACTERS = 1 << 20  # a task takes some 0.2 s: long beside its transfer, short beside a run
_INLINE_TASKS = 4  # below this, starting processes takes longer than the work
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


def encode_documents(tokenizer: Tokenizer, task: Texts, validation_fraction: float) -> dict[str, Encoded]:
    """Encode each text and deal the documents to the splits. Raises UserError for a text with a lone surrogate."""
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
        num_workers: processes, at least 1; at most `num_workers` + 2 tasks are in memory. A small corpus is encoded in this process.

    Raises:
        UserError: a text is not valid Unicode, or a worker process died.
    """
    tasks = make_tasks(batches)
    head = list(itertools.islice(tasks, _INLINE_TASKS))
    if len(head) < _INLINE_TASKS:
        num_workers = min(num_workers, 1)
    with Workers(_encode_task, (tokenizer, validation_fraction), num_workers) as workers:
        yield from workers.map(itertools.chain(head, tasks))


def _encode_task(shared: tuple[Tokenizer, float], task: Texts) -> dict[str, Encoded]:
    return encode_documents(shared[0], task, shared[1])


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
