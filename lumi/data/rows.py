"""A split of a token store -> rows of T + 1 tokens. A row gives T inputs and, shifted by one, T targets.

Texts are cut. Every epoch puts the documents in a new order, joins them, cuts that stream into rows and
shuffles the rows, so that a long document does not fill a batch. An epoch trains every token once, except
fewer than T + 1 at its end.

Conversations, in a split with a loss mask, are packed. A row holds whole ones and then padding, which is not
trained. A conversation longer than a row ends after its last answer that fits, and is left out if none does.
Every epoch shuffles the rows. The two conversations of a pair lie side by side, or are left out together
where a row cannot hold both whole.
"""

import bisect
import functools
import threading
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypeVar

import numpy as np

from lumi.config import UserError
from lumi.data.token_store import Split

_OPEN_ROWS = 256  # rows that packing still adds to; with all of them open, padding shrinks by hardly a token


Order = TypeVar("Order")


class TokenRow(NamedTuple):
    """One row of T + 1 tokens.

    Attributes:
        tokens: (T + 1,) int64.
        starts: (T + 1,) bool, where a document begins.
        trained: (T + 1,) bool, which tokens may be targets.
        documents: ids of the documents in the row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    trained: np.ndarray
    documents: list[int]

    @property
    def num_targets(self) -> int:
        """How many of the T targets count. A document's first token is none."""
        return int((self.trained & ~self.starts)[1:].sum())


class TextRows:
    """The endless rows of a split without a loss mask: documents are cut, each epoch is shuffled anew."""

    def __init__(self, split: Split, length: int, seed: int) -> None:
        self.split, self.length, self.seed = split, length, seed
        self.lengths = np.diff(_signed(split.offsets))
        self.num_tokens = int(self.lengths.sum())
        self.rows_per_epoch = (self.num_tokens - 1) // length
        if self.rows_per_epoch < 1:
            raise UserError(
                "a token store",
                f"must hold more than sequence_length = {length} training tokens",
                got=self.num_tokens,
            )
        self._epoch = _last_two(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The epoch's order of documents, where each of them ends in its stream, and its order of rows."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        return order, np.cumsum(self.lengths[order]), rng.permutation(self.rows_per_epoch)

    def row(self, index: int) -> TokenRow:
        """Row `index`, counted from 0 through all epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        order, ends, rows = self._epoch(epoch)
        return cut_row(self.split, order, ends, int(rows[place]) * self.length, self.length + 1)


class ConversationRows:
    """The endless rows of a split with a loss mask: whole conversations, packed once and shuffled each epoch.

    `num_cut` conversations end early and `num_dropped` are left out, because they are longer than a row.
    `num_tokens` and `num_trained` count what remains. A pair counts as two conversations.
    """

    def __init__(self, split: Split, length: int, seed: int) -> None:
        self.split, self.capacity, self.seed = split, length + 1, seed
        stored = np.diff(_signed(split.offsets))
        trained_N = split.loss_mask(0, len(split.tokens))
        if split.pairs:
            self.lengths, what = _pairs_that_fit(stored, self.capacity), "a pair whose two conversations fit"
        else:
            self.lengths = _lengths_that_fit(split, trained_N, stored, self.capacity)
            what = "an answer that ends"
        kept = np.flatnonzero(self.lengths)
        self.num_cut = int((self.lengths[kept] < stored[kept]).sum())
        self.num_dropped = len(stored) - len(kept)
        if not len(kept):
            raise UserError(
                "a token store",
                f"must hold {what} within sequence_length = {length} tokens",
                got="none",
                remedy="raise it",
            )
        self.num_tokens = int(self.lengths.sum())
        begins = _signed(split.offsets[:-1])
        trained_before = np.concatenate([[0], np.cumsum(trained_N)])
        self.num_trained = int((trained_before[begins + self.lengths] - trained_before[begins]).sum())
        together = 2 if split.pairs else 1
        sizes = self.lengths.reshape(-1, together).sum(axis=1)
        order = np.random.default_rng(seed).permutation(np.flatnonzero(sizes)).tolist()
        self.rows = pack(sizes, order, self.capacity)
        if split.pairs:
            self.rows = [[place for pair in row for place in (2 * pair, 2 * pair + 1)] for row in self.rows]
        self.rows_per_epoch = len(self.rows)
        self._epoch = _last_two(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.rows_per_epoch)
        )

    def row(self, index: int) -> TokenRow:
        """Row `index`, counted from 0 through all epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        return self.packed(int(self._epoch(epoch)[place]))

    def packed(self, place: int) -> TokenRow:
        """Row `place` as it was packed, before any shuffling, 0 <= place < rows_per_epoch."""
        row = empty_row(self.capacity)
        filled = 0
        for document in self.rows[place]:
            begin, size = int(self.split.offsets[document]), int(self.lengths[document])
            row.tokens[filled : filled + size] = self.split.tokens[begin : begin + size]
            row.trained[filled : filled + size] = self.split.loss_mask(begin, begin + size)
            row.starts[filled] = True
            filled += size
        row.starts[filled : filled + 1] = True  # the padding is a document of its own
        row.documents.extend(self.rows[place])
        return row


def make_rows(split: Split, length: int, seed: int) -> TextRows | ConversationRows:
    """A split's training rows of `length` + 1 tokens. Raises UserError if the split does not fill one."""
    return TextRows(split, length, seed) if split.mask is None else ConversationRows(split, length, seed)


def validation_rows(
    split: Split, length: int, max_tokens: int | None
) -> tuple[int, Callable[[int], TokenRow]]:
    """One pass over a split in a fixed order: the number of rows, and the function that reads one.

    Args:
        max_tokens: about how many tokens the rows may hold together. None: the whole split.

    Raises:
        UserError: no row has a target, so there is nothing to measure.
    """
    count, read = _rows_in_order(split, length, max_tokens)
    if not any(read(index).num_targets for index in range(count)):
        some = "" if max_tokens is None else f"the first {max_tokens} of "
        raise UserError(
            "a validation",
            "must hold at least one token to predict",
            got=f"none in {some}{len(split.tokens)} tokens",
            remedy="raise validation_tokens, or hold out more documents",
        )
    return count, read


def _rows_in_order(
    split: Split, length: int, max_tokens: int | None
) -> tuple[int, Callable[[int], TokenRow]]:
    if split.mask is not None:
        conversations = ConversationRows(split, length, seed=0)
        limit = conversations.rows_per_epoch if max_tokens is None else -(-max_tokens // length)
        return min(conversations.rows_per_epoch, limit), conversations.packed
    total = min(len(split.tokens), max_tokens or len(split.tokens))
    order, ends = np.arange(len(split.offsets) - 1), _signed(split.offsets[1:])

    def read(index: int) -> TokenRow:
        start = index * length
        return cut_row(split, order, ends, start, min(length + 1, total - start), size=length + 1)

    return -(-(total - 1) // length), read


def empty_row(size: int) -> TokenRow:
    """A row of `size` tokens of padding."""
    return TokenRow(
        tokens=np.zeros(size, dtype=np.int64),
        starts=np.zeros(size, dtype=bool),
        trained=np.zeros(size, dtype=bool),
        documents=[],
    )


def cut_row(
    split: Split, order: np.ndarray, ends: np.ndarray, start: int, count: int, size: int | None = None
) -> TokenRow:
    """Cut a row out of the stream that documents make in some order.

    Args:
        order: (documents,) their ids, in the order of the stream.
        ends: (documents,) where each of them ends in the stream.
        start, count: the row holds the tokens [start, start + count) of the stream.
        size: tokens of the row with its padding. None: `count`.
    """
    row = empty_row(size or count)
    filled, index = 0, int(np.searchsorted(ends, start, side="right"))
    while filled < count:
        document = int(order[index])
        begin, end = int(split.offsets[document]), int(split.offsets[document + 1])
        skip = start + filled - (int(ends[index]) - (end - begin))  # above 0 only in the first document
        piece = split.tokens[begin + skip : min(end, begin + skip + count - filled)]
        if len(piece):
            row.tokens[filled : filled + len(piece)] = piece
            row.starts[filled] = skip == 0
            row.documents.append(document)
        filled, index = filled + len(piece), index + 1
    row.trained[:count] = True
    row.starts[count : count + 1] = True  # the padding is a document of its own
    return row


def pack(lengths: np.ndarray, order: Iterable[int], capacity: int) -> list[list[int]]:
    """Pack documents into rows of at most `capacity` tokens: best fit, among the open rows.

    Args:
        lengths: (documents,) tokens of each, at most `capacity`.
        order: the documents to pack, in the order in which they come.
    """
    rows: list[list[int]] = []
    spaces: list[tuple[int, int]] = []  # (room left, row) of the open rows, sorted
    for document in order:
        size = int(lengths[document])
        place = bisect.bisect_left(spaces, (size, -1))
        if place < len(spaces):
            space, row = spaces.pop(place)
            rows[row].append(document)
        else:
            space, row = capacity, len(rows)
            rows.append([document])
        bisect.insort(spaces, (space - size, row))
        if len(spaces) > _OPEN_ROWS:
            spaces.pop(0)  # the fullest
    return rows


def _last_two(shuffle: Callable[[int], Order]) -> Callable[[int], Order]:
    """The same function of an epoch, which keeps two results. Threads wait for the one that computes."""
    lock, kept = threading.Lock(), functools.lru_cache(maxsize=2)(shuffle)

    def order(epoch: int) -> Order:
        with lock:
            return kept(epoch)

    return order


def _lengths_that_fit(split: Split, trained_N: np.ndarray, stored: np.ndarray, capacity: int) -> np.ndarray:
    """How many tokens of each conversation a row takes: all, those up to the last answer that fits, or 0."""
    num_trained = np.add.reduceat(trained_N, _signed(split.offsets[:-1]), dtype=np.int64)
    lengths = np.where(num_trained > 0, stored, 0)
    for document in np.flatnonzero(lengths > capacity):
        begin = int(split.offsets[document])
        trained = trained_N[begin : begin + capacity + 1]
        ends = np.flatnonzero(trained[:-1] & ~trained[1:])  # an answer's last trained token ends its turn
        lengths[document] = ends[-1] + 1 if len(ends) else 0
    return lengths


def _pairs_that_fit(stored: np.ndarray, capacity: int) -> np.ndarray:
    """The tokens of each conversation; 0 for both of a pair that is longer than a row."""
    pairs = stored.reshape(-1, 2)
    return np.where(pairs.sum(axis=1, keepdims=True) <= capacity, pairs, 0).reshape(-1)


def _signed(offsets: np.ndarray) -> np.ndarray:
    """Offsets as int64, which numpy adds to other integers without going through float64."""
    return np.asarray(offsets).astype(np.int64)
