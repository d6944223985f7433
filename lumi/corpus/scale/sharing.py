"""Stage 2: a row of keys -> the documents that share their key in it with others.

Documents with a key of their own are no duplicates by this row, and stage 3 does not see them. In a short run
of equal keys the signatures are compared, so that only documents that are near another one remain. A long run
stays as it is: it has too many pairs. Stage 3 compares each of its documents with those kept before it.
"""

import os
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lumi.corpus.deduplication import are_near
from lumi.corpus.scale.keys import count_bands, count_rows
from lumi.corpus.scale.signatures import Signatures
from lumi.corpus.scale.work import Work

SHORT_RUN = 16  # documents with the same key that are compared with each other
PAIRS = 16_384  # that are compared at a time
ENTRY = np.dtype([("document", "<i8"), ("key", "<u8")])


def share_rows(work: Work, rank: int, num_tasks: int) -> None:
    """Sort every `num_tasks`-th row of keys, from `rank` on, unless that is done."""
    config = work.config.deduplication
    for row in range(rank, count_rows(config), num_tasks):
        if not work.shared(row).exists():
            entries = _find_shared(work, row)
            if row < count_bands(config):
                entries = _without_strangers(entries, work)
            _save(work.shared(row), entries[np.argsort(entries["document"], kind="stable")])


def _find_shared(work: Work, row: int) -> "npt.NDArray[np.void]":
    """The entries (document, key) of keys that occur more than once, by key and then by document."""
    keys = np.empty(work.offsets[-1], dtype="<u8")
    for number in range(len(work.units)):
        there = slice(work.offsets[number], work.offsets[number + 1])
        keys[there] = np.load(work.index(number) / "keys.npy", mmap_mode="r")[row]
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    again = keys[1:] == keys[:-1]
    shared = np.concatenate([again, [False]]) | np.concatenate([[False], again]) if len(keys) else again
    entries = np.empty(int(shared.sum()), dtype=ENTRY)
    entries["document"], entries["key"] = order[shared], keys[shared]
    return entries


def _without_strangers(entries: "npt.NDArray[np.void]", work: Work) -> "npt.NDArray[np.void]":
    """The entries without those documents of short runs that are near no other document of their run."""
    keys, documents, signatures = entries["key"], entries["document"], Signatures(work)
    begins = np.concatenate([[True], keys[1:] != keys[:-1]]) if len(keys) else np.empty(0, bool)
    run = np.cumsum(begins) - 1
    lengths = np.bincount(run)[run]
    stays = lengths > SHORT_RUN
    for distance in range(1, SHORT_RUN):
        left = np.nonzero(run[distance:] == run[:-distance])[0]
        left = left[~(stays[left] & stays[left + distance])]
        for start in range(0, len(left), PAIRS):
            one = left[start : start + PAIRS]
            two = one + distance
            near = are_near(
                signatures.fetch(documents[one]),
                signatures.fetch(documents[two]),
                work.config.deduplication,
            )
            stays[one[near]] = stays[two[near]] = True
    return entries[stays]


def _save(path: Path, entries: "npt.NDArray[np.void]") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    with open(temporary, "wb") as file:
        np.save(file, entries)
    os.replace(temporary, path)


class SharedKeys:
    """The entries of all rows, given out in the order of documents; few are in memory at a time."""

    def __init__(self, work: Work) -> None:
        self._rows = [_Row(work.shared(row)) for row in range(count_rows(work.config.deduplication))]

    def take(self, end: int) -> list["npt.NDArray[np.void]"]:
        """For each row its entries of documents before `end` that were not taken yet, by document."""
        return [row.take(end) for row in self._rows]


class _Row:
    """A file of entries that is read from begin to end, without being kept open: there may be thousands."""

    BUFFER = 8_192  # entries

    def __init__(self, path: Path) -> None:
        self._path = path
        with open(path, "rb") as file:
            np.lib.format.read_magic(file)
            (self._left,), _, _ = np.lib.format.read_array_header_1_0(file)
            self._position = file.tell()
        self._buffer = np.empty(0, dtype=ENTRY)

    def take(self, end: int) -> "npt.NDArray[np.void]":
        taken = []
        while True:
            if not len(self._buffer) and self._left:
                self._fill()
            count = int(np.searchsorted(self._buffer["document"], end))
            taken.append(self._buffer[:count])
            self._buffer = self._buffer[count:]
            if len(self._buffer) or not self._left:
                return np.concatenate(taken)

    def _fill(self) -> None:
        count = min(self.BUFFER, self._left)
        self._buffer = np.fromfile(self._path, ENTRY, count, offset=self._position)
        self._position += self._buffer.nbytes
        self._left -= count
