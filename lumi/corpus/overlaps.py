"""Does a document share text with an evaluation set? The n-grams of all sets, as hashes of 64 bits.

Each known word has a random number. The hash of an n-gram is the sum of its words' numbers, each times a
random number of its place, modulo 2^64. In a corpus of 10^12 words, one n-gram has the hash of one of 10^6
others by accident with a probability of 5%.
"""

from collections.abc import Iterator, Sequence
from itertools import repeat

import numpy as np
import numpy.typing as npt

from lumi.corpus.evaluation_sets import EvaluationSet
from lumi.corpus.words import plain_words

Hashes = npt.NDArray[np.uint64]


class Overlaps:
    """The texts of evaluation sets, in about 25 bytes for each n-gram and 100 for each word.

    Args:
        sets: what is looked for.
        ngram: as many successive words of a text are looked for, or all words of a shorter text.
    """

    def __init__(self, sets: Sequence[EvaluationSet], ngram: int) -> None:
        self._names, self._ngram = [each.name for each in sets], ngram
        words = dict.fromkeys(word for each in sets for text in each.texts for word in text.split(" "))
        self._places = {word: place for place, word in enumerate(words, start=1)}  # 0: an unknown word
        random = np.random.default_rng(0)
        self._numbers = random.integers(1, 2**64, size=len(words) + 1, dtype=np.uint64)
        self._numbers[0] = 0
        self._factors = random.integers(1, 2**64, size=ngram, dtype=np.uint64) | np.uint64(1)
        self._tables = {size: _Table(found) for size, found in self._windows_by_size(sets).items()}

    def find(self, text: str) -> str:
        """The name of the first set that the text shares words with, or ""."""
        first = len(self._names)
        for size, hashes in self._sizes(plain_words(text)):
            if size in self._tables:
                first = min([first, *self._tables[size].owners_of(hashes)])
        return self._names[first] if first < len(self._names) else ""

    def _sizes(self, words: Sequence[str]) -> Iterator[tuple[int, Hashes]]:
        """(size, the hash of each run of so many words) for all sizes up to `ngram`."""
        places = np.fromiter(map(self._places.get, words, repeat(0)), np.int64, len(words))
        numbers = self._numbers[places]
        hashes = np.zeros(len(words), dtype=np.uint64)
        for size in range(1, min(len(words), self._ngram) + 1):
            hashes = hashes[: len(words) - size + 1] + numbers[size - 1 :] * self._factors[size - 1]
            yield size, hashes

    def _windows_by_size(self, sets: Sequence[EvaluationSet]) -> dict[int, list[tuple[int, Hashes]]]:
        """size -> the number of each set and the hashes that stand for it, in the order of the sets."""
        found: dict[int, list[tuple[int, Hashes]]] = {}
        for owner, each in enumerate(sets):
            for text in each.texts:
                *_, (size, hashes) = self._sizes(text.split(" "))
                found.setdefault(size, []).append((owner, hashes))
        return found


class _Table:
    """Sorted hashes, and for each the number of the first set that has it."""

    def __init__(self, found: Sequence[tuple[int, Hashes]]) -> None:
        owners = np.repeat([owner for owner, _ in found], [len(hashes) for _, hashes in found])
        self._known, first = np.unique(np.concatenate([hashes for _, hashes in found]), return_index=True)
        self._owners = owners[first].astype(np.uint16)
        # The first bits of all hashes, 8 to 16 places for each: a look here saves most searches.
        self._shift = np.uint64(61 - len(self._known).bit_length())
        self._begins = np.zeros(1 << (64 - int(self._shift)), dtype=bool)
        self._begins[self._known >> self._shift] = True

    def owners_of(self, hashes: Hashes) -> list[int]:
        """The numbers of the sets that have some of these hashes."""
        likely = hashes[self._begins[hashes >> self._shift]]
        places = np.minimum(np.searchsorted(self._known, likely), len(self._known) - 1)
        return self._owners[places[self._known[places] == likely]].tolist()
