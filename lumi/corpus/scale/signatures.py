"""The signatures of all documents on disk, by the numbers of the documents."""

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from lumi.corpus.scale.work import Work

OPEN_UNITS = 128  # files that are mapped at a time


class Signatures:
    """Reads the signatures that are asked for, and no others."""

    def __init__(self, work: Work) -> None:
        self._work = work
        self._unit = lru_cache(maxsize=OPEN_UNITS)(self._open)

    def fetch(self, documents: "npt.NDArray[np.int64]") -> "npt.NDArray[np.uint32]":
        """(documents, views, permutations) signatures of documents, which are named by their numbers."""
        found = np.empty(shape_of(self._work, len(documents)), dtype="<u4")
        units = np.searchsorted(self._work.offsets, documents, side="right") - 1
        for unit in np.unique(units):
            places = np.nonzero(units == unit)[0]
            found[places] = self._unit(unit)[documents[places] - self._work.offsets[unit]]
        return found

    def _open(self, unit: int) -> "npt.NDArray[np.uint32]":
        num_documents = int(self._work.offsets[unit + 1] - self._work.offsets[unit])
        shape = shape_of(self._work, num_documents)
        return np.memmap(self._work.index(unit) / "signatures", "<u4", "r", shape=shape)


def shape_of(work: Work, num_documents: int) -> tuple[int, int, int]:
    """(documents, views, permutations) of signatures; without near duplicates there are none."""
    config = work.config
    num_views = 2 if config.conversation_filters is not None else 1
    return num_documents, num_views, config.deduplication.num_permutations if config.deduplication.near else 0
