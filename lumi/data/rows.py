"""A split of a token store -> rows of T + 1 tokens, of which T are inputs and, shifted by one, T are targets.

Pre-training cuts: every epoch puts the documents in a new order, one after the other, cuts that stream into rows, and shuffles the
rows, so that a long document does not fill a batch. Every token is trained once an epoch, but for the fewer than T + 1 at the end.

Fine-tuning packs: a split with a loss mask holds conversations, and a row holds whole ones, filled up with padding that is not trained.
One longer than a row ends behind its last answer that fits, and is left out where none does. Every epoch shuffles the rows.
"""

import bisect
import functools
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

from lumi.config import UserError
from lumi.data.token_store import Split

_OPEN_ROWS = (
    256  # that the packing looks for room in; with 256 hardly a token more is padding than with all of them
)


class Row(NamedTuple):
    """`tokens` (T + 1,) int64; `starts` and `trained` (T + 1,) bool: where a document begins, and what may be a target; the ids of the
    documents touched."""

    tokens: np.ndarray
    starts: np.ndarray
    trained: np.ndarray
    documents: list[int]


class TextRows:
    """The rows of a split without a loss mask, without end: documents are cut, and each epoch is shuffled anew."""

    def __init__(self, split: Split, length: int, seed: int):
        self.split, self.length, self.seed = split, length, seed
        self.lengths = np.diff(np.asarray(split.offsets).astype(np.int64))
        self.num_tokens = int(self.lengths.sum())
        self.rows_per_epoch = (self.num_tokens - 1) // length
        if self.rows_per_epoch < 1:
            raise UserError(
                f"a token store must hold more than sequence_length = {length} training tokens, got {self.num_tokens}"
            )
        self._epoch = functools.lru_cache(maxsize=2)(self._shuffle)

    def _shuffle(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Document ids in this epoch's order, where each ends in the epoch's stream, and the order of the rows."""
        rng = np.random.default_rng([self.seed, epoch])
        order = rng.permutation(len(self.lengths))
        return order, np.cumsum(self.lengths[order]), rng.permutation(self.rows_per_epoch)

    def row(self, index: int) -> Row:
        """Row `index`, counted from 0 through all epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        order, ends, rows = self._epoch(epoch)
        return cut_row(self.split, order, ends, int(rows[place]) * self.length, self.length + 1)


class ConversationRows:
    """The rows of a split with a loss mask, without end: whole conversations, packed once, the rows shuffled each epoch.

    `num_cut` conversations end early and `num_dropped` are left out, because they are longer than a row; `num_tokens` and `num_trained`
    count what is left.
    """

    def __init__(self, split: Split, length: int, seed: int):
        self.split, self.capacity, self.seed = split, length + 1, seed
        stored = np.diff(np.asarray(split.offsets).astype(np.int64))
        trained_N = split.loss_mask(0, len(split.tokens))
        self.lengths = _lengths_that_fit(split, trained_N, stored, self.capacity)
        kept = np.flatnonzero(self.lengths)
        self.num_cut, self.num_dropped = (
            int((self.lengths[kept] < stored[kept]).sum()),
            len(stored) - len(kept),
        )
        if not len(kept):
            raise UserError(
                f"a token store must hold an answer that ends within sequence_length = {length} tokens, got none; raise it"
            )
        self.num_tokens = int(self.lengths.sum())
        begins, before = (
            np.asarray(split.offsets[:-1]).astype(np.int64),
            np.concatenate([[0], np.cumsum(trained_N)]),
        )
        self.num_trained = int((before[begins + self.lengths] - before[begins]).sum())
        self.rows = pack(self.lengths, np.random.default_rng(seed).permutation(kept).tolist(), self.capacity)
        self.rows_per_epoch = len(self.rows)
        self._epoch = functools.lru_cache(maxsize=2)(
            lambda epoch: np.random.default_rng([seed, epoch]).permutation(self.rows_per_epoch)
        )

    def row(self, index: int) -> Row:
        """Row `index`, counted from 0 through all epochs."""
        epoch, place = divmod(index, self.rows_per_epoch)
        return self.packed(int(self._epoch(epoch)[place]))

    def packed(self, place: int) -> Row:
        """Row `place` of the packing, 0 <= place < rows_per_epoch, in no order of training."""
        row = empty_row(self.capacity)
        filled = 0
        for document in self.rows[place]:
            begin, size = int(self.split.offsets[document]), int(self.lengths[document])
            row.tokens[filled : filled + size] = self.split.tokens[begin : begin + size]
            row.trained[filled : filled + size] = self.split.loss_mask(begin, begin + size)
            row.starts[filled] = True
            filled += size
        row.starts[filled : filled + 1] = True  # what pads the row is a document of its own
        row.documents.extend(self.rows[place])
        return row


def make_rows(split: Split, length: int, seed: int) -> TextRows | ConversationRows:
    """The training rows of a split, of `length` + 1 tokens each. Raises UserError where the split is too small for one."""
    return TextRows(split, length, seed) if split.mask is None else ConversationRows(split, length, seed)


def validation_rows(split: Split, length: int, max_tokens: int | None) -> tuple[int, Callable[[int], Row]]:
    """The number of rows of one pass over a split in a fixed order, and what gives each; together at most about `max_tokens`."""
    if split.mask is not None:
        conversations = ConversationRows(split, length, seed=0)
        limit = conversations.rows_per_epoch if max_tokens is None else -(-max_tokens // length)
        return min(conversations.rows_per_epoch, limit), conversations.packed
    total = min(len(split.tokens), max_tokens or len(split.tokens))
    order, ends = np.arange(len(split.offsets) - 1), np.asarray(split.offsets[1:]).astype(np.int64)
    return -(-(total - 1) // length), lambda index: cut_row(
        split, order, ends, index * length, min(length + 1, total - index * length), length + 1
    )


def empty_row(size: int) -> Row:
    """A row of `size` tokens of padding."""
    return Row(np.zeros(size, dtype=np.int64), np.zeros(size, dtype=bool), np.zeros(size, dtype=bool), [])


def cut_row(
    split: Split, order: np.ndarray, ends: np.ndarray, start: int, count: int, size: int | None = None
) -> Row:
    """Tokens [start, start + count) of the stream of the documents `order`, of which each ends at `ends`, padded to `size`."""
    row = empty_row(size or count)
    filled, index = 0, int(np.searchsorted(ends, start, side="right"))
    while filled < count:
        document = int(order[index])
        begin, end = int(split.offsets[document]), int(split.offsets[document + 1])
        skip = start + filled - (int(ends[index]) - (end - begin))  # not 0 for the first document alone
        piece = split.tokens[begin + skip : min(end, begin + skip + count - filled)]
        if len(piece):
            row.tokens[filled : filled + len(piece)] = piece
            row.starts[filled] = skip == 0
            row.documents.append(document)
        filled, index = filled + len(piece), index + 1
    row.trained[:count] = True
    row.starts[count : count + 1] = True  # what pads the row is a document of its own
    return row


def pack(lengths: np.ndarray, order: Iterable[int], capacity: int) -> list[list[int]]:
    """Documents into rows of at most `capacity` tokens: each into the open row that it fills best (best fit, bounded).

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


def _lengths_that_fit(split: Split, trained_N: np.ndarray, stored: np.ndarray, capacity: int) -> np.ndarray:
    """How many tokens of each conversation go into a row: all, those up to its last answer that fits, or 0."""
    lengths = np.where(
        np.add.reduceat(trained_N, np.asarray(split.offsets[:-1]).astype(np.int64), dtype=np.int64) > 0,
        stored,
        0,
    )
    for document in np.flatnonzero(lengths > capacity):
        begin = int(split.offsets[document])
        trained = trained_N[begin : begin + capacity + 1]
        ends = np.flatnonzero(
            trained[:-1] & ~trained[1:]
        )  # an answer's last trained token is its end-of-turn
        lengths[document] = ends[-1] + 1 if len(ends) else 0
    return lengths
