"""Exact and near duplicates across all sources.

Exact ones by SHA-256, near ones by MinHash-LSH (Broder 1997; Lee et al. 2022, arXiv:2107.06499).
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import rensa

from lumi.chat.messages import Conversation, contents
from lumi.chat.pairs import Pair
from lumi.corpus.documents import Document, bytes_of, text_of
from lumi.corpus.words import split_words

# A part with fewer words ("Yes.") is the same in many unrelated texts.
LEAST_PART_WORDS = 20
# The share of pairs exactly at the threshold that the bands must find.
RECALL = 0.99
# Entries of the dictionary of recent documents (some 200 bytes each) before they are packed.
RECENT_BANDS = 1 << 18


@dataclass(frozen=True, kw_only=True)
class DeduplicationConfig:
    """What counts as a duplicate. The first of them, in the order of the sources, stays.

    Exact duplicates are the same bytes. Normalized ones are equal but for case, runs of white space and the
    Unicode form, which also tells no indentation apart.

    Two documents are near duplicates if the estimated Jaccard similarity of their sets of `shingle_words`
    successive words, in lower case, is at least `threshold`, in (0, 1]. The standard error of the estimate is
    sqrt(threshold (1 - threshold) / num_permutations). Two conversations, or two pairs, must be that similar
    twice: as a whole, and in their answers alone.
    """

    # Drop documents that are equal to an earlier one.
    exact: bool = True
    # Drop documents that are equal to an earlier one but for case, white space and the Unicode form.
    normalized: bool = False
    # Drop documents that are similar to an earlier one, by MinHash.
    near: bool = True
    # The estimated similarity, in (0, 1], from which two documents are near duplicates.
    threshold: float = 0.8
    # Hash functions of a MinHash signature, 16 to 4096; more estimate better.
    num_permutations: int = 128
    # Successive words that are compared as one item.
    shingle_words: int = 5
    # Chooses the hash functions.
    seed: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.threshold <= 1:
            raise ValueError(f"threshold must be within (0, 1], got {self.threshold}")
        if not 16 <= self.num_permutations <= 4096:
            raise ValueError(f"num_permutations must be between 16 and 4096, got {self.num_permutations}")
        if self.shingle_words < 1:
            raise ValueError(f"shingle_words must be at least 1, got {self.shingle_words}")
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed must be between 0 and 2**32 - 1, got {self.seed}")


class Fingerprint(NamedTuple):
    """What duplicates are recognized by; b"" for what is switched off.

    `digest`: SHA-256 of the bytes. `normalized`: SHA-256 of the words in lower case. `signature`: MinHash of
    the whole, and perhaps of a part, as little-endian uint32.
    """

    digest: bytes
    normalized: bytes
    signature: bytes


def fingerprint(documents: Sequence[Document], config: DeduplicationConfig) -> list[Fingerprint]:
    """The fingerprints of texts, of conversations or of pairs.

    The answers of a conversation or a pair tell it from others about the same long passage. They get a
    signature of their own, and near duplicates are alike in both. If the answers have fewer than
    LEAST_PART_WORDS words, the wholes must be the same bytes.
    """
    digests = [hashlib.sha256(bytes_of(document)).digest() for document in documents]
    needs_words = config.near or config.normalized
    words = [_normalize(text_of(document)) if needs_words else [] for document in documents]
    normalized = [
        hashlib.sha256(" ".join(whole).encode()).digest() if config.normalized else b"" for whole in words
    ]
    signatures = [b""] * len(documents)
    if config.near and documents:
        rows = _sign([shingle(whole, config.shingle_words) for whole in words], config)
        parts = [
            _shingle_part(_normalize(_answers(document)), digest, config)
            for document, digest in zip(documents, digests, strict=True)
            if not isinstance(document, str)
        ]
        if parts:
            rows = np.concatenate([rows, _sign(parts, config)], axis=1)
        signatures = [row.tobytes() for row in rows]
    if not config.exact:
        digests = [b""] * len(documents)
    return list(map(Fingerprint, digests, normalized, signatures))


def shingle(words: Sequence[str], size: int) -> list[str]:
    """Every `size` successive words, joined; a shorter text gives all its words as one shingle."""
    if len(words) <= size:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[start:] for start in range(size)), strict=False)))


def _normalize(text: str) -> list[str]:
    return split_words(unicodedata.normalize("NFC", text).lower())


def _answers(document: Conversation | Pair) -> str:
    if isinstance(document, Pair):
        document = (*document.chosen, *document.rejected)
    return contents(message for message in document if message.role == "assistant")


def _shingle_part(part: list[str], digest: bytes, config: DeduplicationConfig) -> list[str]:
    return [digest.hex()] if len(part) < LEAST_PART_WORDS else shingle(part, config.shingle_words)


def _sign(shingles: list[list[str]], config: DeduplicationConfig) -> "npt.NDArray[np.uint32]":
    """(documents, permutations) minima."""
    rows = rensa.RMinHash.digests_from_token_sets(shingles, config.num_permutations, config.seed)
    return np.array(rows, dtype="<u4")


def choose_bands(threshold: float, num_permutations: int) -> int:
    """The fewest bands that find a pair at the threshold with probability RECALL: 1 - (1 - t^(n/b))^b."""
    divisors = [bands for bands in range(1, num_permutations + 1) if num_permutations % bands == 0]
    for bands in divisors:
        if 1 - (1 - threshold ** (num_permutations // bands)) ** bands >= RECALL:
            return bands
    return num_permutations


def are_near(
    left: "npt.NDArray[np.uint32]", right: "npt.NDArray[np.uint32]", config: DeduplicationConfig
) -> "npt.NDArray[np.bool_]":
    """(documents,) whether two signatures of (documents, views, permutations) agree up to the threshold."""
    required = config.threshold * config.num_permutations - 1e-6  # float rounding
    return ((left == right).sum(axis=2) >= required).all(axis=1)


class Deduplicator:
    """Remembers the documents that were kept.

    A document takes 32 bytes for exact duplicates, as many for normalized ones, and about 4
    `num_permutations` + 12 bands bytes for near ones.

    Args:
        config: what a duplicate is.
        has_parts: whether fingerprints hold a second signature, of answers; it takes as much memory as the
            first.
    """

    def __init__(self, config: DeduplicationConfig, *, has_parts: bool = False) -> None:
        self.config, self._num_views = config, 2 if has_parts else 1
        self._digests: set[bytes] = set()
        self._normalized: set[bytes] = set()
        self._bands = BandIndex(
            choose_bands(config.threshold, config.num_permutations), config.num_permutations
        )
        self._num_kept = 0
        self._signatures = np.empty((1024, self._num_views, config.num_permutations), dtype="<u4")

    def decide(
        self,
        fingerprints: Sequence[Fingerprint | None],
        band_hashes: "Sequence[npt.NDArray[np.uint64]] | None" = None,
    ) -> Iterator[str]:
        """The reason to drop each document, or "" to keep it. None: a document that was dropped before.

        A document is remembered when its answer is taken, not earlier.

        Args:
            band_hashes: for each fingerprint that is not None, the bands that it may share with others, where
                that is known already; else all of its bands are looked up.
        """
        self._bands.pack_if_large()
        present = [item for item in fingerprints if item is not None]
        if band_hashes is None:
            band_hashes = list(self._bands.hash_rows(self._stack(present)[:, 0]) if self.config.near else ())
        packed = iter(self._bands.find_packed(band_hashes))
        rows = iter(band_hashes)
        for item in fingerprints:
            if item is None:
                yield ""
                continue
            hashes = next(rows, None)
            yield self._decide(item, [] if hashes is None else hashes.tolist(), next(packed, []))

    def _decide(self, item: Fingerprint, hashes: list[int], packed: list[int]) -> str:
        if item.digest:
            if item.digest in self._digests:
                return "exact_duplicate"
            self._digests.add(item.digest)
        if item.normalized:
            if item.normalized in self._normalized:
                return "normalized_duplicate"
            self._normalized.add(item.normalized)
        if not hashes:
            return ""
        signature = self._stack([item])
        candidates = sorted({*packed, *self._bands.find_recent(hashes)})
        if candidates and are_near(self._signatures[candidates], signature, self.config).any():
            return "near_duplicate"
        if self._num_kept == len(self._signatures):
            self._signatures = np.concatenate([self._signatures, np.empty_like(self._signatures)])
        self._signatures[self._num_kept] = signature[0]
        self._bands.add(hashes, self._num_kept)
        self._num_kept += 1
        return ""

    def _stack(self, fingerprints: Sequence[Fingerprint]) -> "npt.NDArray[np.uint32]":
        """(documents, views, permutations)"""
        data = b"".join(item.signature for item in fingerprints)
        return np.frombuffer(data, dtype="<u4").reshape(
            len(fingerprints), self._num_views, self.config.num_permutations
        )


class BandIndex:
    """band of a signature -> documents.

    Recent documents are in a dictionary, the others in sorted arrays of 12 bytes an entry. rensa's own
    index takes only its live objects, and those can reach another process or a file only as pickles.
    """

    def __init__(self, num_bands: int, num_permutations: int) -> None:
        self.num_bands, self.width = num_bands, num_permutations // num_bands
        self._recent: dict[int, list[int]] = {}
        self._num_recent = 0
        self._packed: list[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]] = []

    def hash_rows(self, signatures: "npt.NDArray[np.uint32]") -> "npt.NDArray[np.uint64]":
        """(documents, bands) hashes of 64 bits. Each band has its own start value: one table serves all."""
        columns = signatures.reshape(len(signatures), self.num_bands, self.width).astype(np.uint64)
        hashes = np.broadcast_to(np.arange(1, self.num_bands + 1, dtype=np.uint64), columns.shape[:2])
        for index in range(self.width):
            hashes = (hashes ^ columns[:, :, index]) * np.uint64(0x9E3779B97F4A7C15)
            hashes = hashes ^ (hashes >> np.uint64(29))
        return hashes

    def find_packed(self, rows: "Sequence[npt.NDArray[np.uint64]]") -> list[list[int]]:
        """For each row of hashes, the packed documents that share a band with it."""
        found: list[list[int]] = [[] for _ in rows]
        if not self._packed or not found:
            return found
        hashes = np.concatenate(rows)
        owners = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        for keys, documents in self._packed:
            first = np.searchsorted(keys, hashes, side="left")
            for place in np.nonzero(keys[np.minimum(first, len(keys) - 1)] == hashes)[0]:
                last = np.searchsorted(keys, hashes[place], side="right")
                found[owners[place]].extend(documents[first[place] : last].tolist())
        return found

    def find_recent(self, hashes: list[int]) -> list[int]:
        """The recent documents that share a band with one row of hashes."""
        recent = self._recent
        return [document for key in hashes if key in recent for document in recent[key]]

    def add(self, hashes: list[int], document: int) -> None:
        """Remember a document under its row of hashes."""
        for key in hashes:
            self._recent.setdefault(key, []).append(document)
        self._num_recent += len(hashes)

    def pack(self) -> None:
        """Move the recent documents to a sorted array. Arrays of similar size merge, so they stay few."""
        if not self._num_recent:
            return
        pairs = [(key, document) for key, documents in self._recent.items() for document in documents]
        keys = np.array([key for key, _ in pairs], dtype=np.uint64)
        documents = np.array([document for _, document in pairs], dtype=np.uint32)
        self._recent, self._num_recent = {}, 0
        while self._packed and len(self._packed[-1][0]) <= 2 * len(keys):
            more_keys, more_documents = self._packed.pop()
            keys, documents = np.concatenate([more_keys, keys]), np.concatenate([more_documents, documents])
        order = np.argsort(keys, kind="stable")
        self._packed.append((keys[order], documents[order]))

    def pack_if_large(self) -> None:
        """Pack if the dictionary has grown to RECENT_BANDS entries; call it between two batches."""
        if self._num_recent >= RECENT_BANDS:
            self.pack()
