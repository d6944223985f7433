"""The keys of a document: two documents can only be duplicates if they share one.

A row of keys for each band of the signatures, then one for the exact and one for the normalized hash.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from lumi.corpus.deduplication import BandIndex, DeduplicationConfig, Fingerprint, choose_bands

KEY_BYTES = 8


def count_bands(config: DeduplicationConfig) -> int:
    """The rows of keys that are bands; they come first."""
    return choose_bands(config.threshold, config.num_permutations) if config.near else 0


def hash_fields(config: DeduplicationConfig) -> list[str]:
    """The fields of a fingerprint whose hashes are the other rows of keys."""
    return [*(["digest"] if config.exact else []), *(["normalized"] if config.normalized else [])]


def count_rows(config: DeduplicationConfig) -> int:
    """The rows of keys."""
    return count_bands(config) + len(hash_fields(config))


def keys_of(
    fingerprints: Sequence[Fingerprint], signatures: "npt.NDArray[np.uint32]", config: DeduplicationConfig
) -> "npt.NDArray[np.uint64]":
    """(documents, rows) keys; `signatures`: (documents, views, permutations) of the same documents."""
    keys = np.empty((len(fingerprints), count_rows(config)), dtype="<u8")
    num_bands = count_bands(config)
    if num_bands:
        keys[:, :num_bands] = BandIndex(num_bands, config.num_permutations).hash_rows(signatures[:, 0])
    for row, field in enumerate(hash_fields(config), start=num_bands):
        starts = b"".join(getattr(item, field)[:KEY_BYTES] for item in fingerprints)
        keys[:, row] = np.frombuffer(starts, dtype="<u8")
    return keys
