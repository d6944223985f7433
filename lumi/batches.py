"""Token stores -> training batches, as pure functions of (seed, step).

Every epoch of a store puts its documents in a new order, one after the other, cuts that stream into rows of T inputs and, shifted
by one, T targets, and shuffles the rows, so that a long document does not fill a batch. Every token is trained once an epoch, but
for the fewer than T + 1 at the end. No state but the step is needed to resume, with any number of processes. Rows of several stores
are interleaved by their weights.

Documents in a row never see each other: `cu_seqlens` marks where each begins, positions restart there, and no target crosses it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lumi.config import UserError
from lumi.token_store import Split

IGNORE = -100  # a target that is not trained; torch's and the kernels' ignore_index
_WEIGHT_UNITS = 1_000_000  # mixing weights are rounded to millionths, so that interleaving is exact integer arithmetic


Result = TypeVar("Result")


class Row(NamedTuple):
    """T + 1 tokens (int64), True (bool) where a document begins, and the ids of the documents touched."""

    tokens: np.ndarray
    starts: np.ndarray
    documents: list[int]


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of a batch. `batch_tokens` counts the tokens of one optimizer step over all processes."""

    sequence_length: int = 1024
    batch_tokens: int = 65_536
    micro_batch_size: int = 8  # rows that one process holds at a time

    def __post_init__(self):
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        if self.micro_batch_size < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        if self.batch_tokens < 1 or self.batch_tokens % (self.sequence_length * self.micro_batch_size):
            raise ValueError(
                f"batch_tokens must be a multiple of sequence_length x micro_batch_size = "
                f"{self.sequence_length * self.micro_batch_size}, got {self.batch_tokens}"
            )

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_tokens // self.sequence_length

    def micro_steps(self, world_size: int) -> int:
        """Micro-batches that each of `world_size` processes runs in a step. Raises UserError where they do not come out even."""
        if self.rows % (self.micro_batch_size * world_size):
            raise UserError(
                f"batches.batch_tokens must be a multiple of sequence_length x micro_batch_size x processes = "
                f"{self.sequence_length} x {self.micro_batch_size} x {world_size}, got {self.batch_tokens}"
            )
        return self.rows // (self.micro_batch_size * world_size)


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens. Tensors: `tokens`, `targets` (IGNORE where untrained), `positions` (B, T) int64; `cu_seqlens` int32, the
    offsets of the documents in the B*T flattened tokens, from 0 to B*T, every row's start among them."""

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor

    @property
    def num_targets(self) -> int:
        """Trained targets."""
        return int((self.targets != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`."""
        return Batch(*(t.to(device, non_blocking=True) for t in (self.tokens, self.targets, self.positions, self.cu_seqlens)))


class Stream:
    """One split of a store as rows of `length` + 1 tokens: row by row without end, each epoch shuffled anew."""

    def __init__(self, split: Split, length: int, seed: int):
        if split.mask is not None:
            raise UserError("--data-dirs must hold text for pre-training, got a token store with a loss mask, which is not read yet")
        self.split, self.length, self.seed = split, length, seed
        self.lengths = np.diff(np.asarray(split.offsets).astype(np.int64))
        self.num_tokens = int(self.lengths.sum())
        self.rows_per_epoch = (self.num_tokens - 1) // length
        if self.rows_per_epoch < 1:
            raise UserError(f"a token store must hold more than sequence_length = {length} training tokens, got {self.num_tokens}")
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
        return read_row(self.split, order, ends, int(rows[place]) * self.length, self.length + 1)


def read_row(split: Split, order: np.ndarray, ends: np.ndarray, start: int, count: int) -> Row:
    """Tokens [start, start + count) of the stream of the documents `order`, of which each ends at `ends`."""
    tokens, starts, documents = np.empty(count, dtype=np.int64), np.zeros(count, dtype=bool), []
    filled, index = 0, int(np.searchsorted(ends, start, side="right"))
    while filled < count:
        document = int(order[index])
        begin, end = int(split.offsets[document]), int(split.offsets[document + 1])
        skip = start + filled - (int(ends[index]) - (end - begin))  # not 0 for the first document alone
        piece = split.tokens[begin + skip : min(end, begin + skip + count - filled)]
        if len(piece):
            tokens[filled : filled + len(piece)] = piece
            starts[filled] = skip == 0
            documents.append(document)
        filled, index = filled + len(piece), index + 1
    return Row(tokens, starts, documents)


class Batches:
    """The training batches of a run: `batches[step]` is one whole optimizer step, `batches.rows(step, a, b)` a part of it.

    Args:
        splits: one per `--data-dirs`.
        weights: share of the rows that each gets; normalised here. None: in proportion to the tokens.
        config: sizes.
        seed: of the shuffling.
    """

    def __init__(self, splits: Sequence[Split], weights: Sequence[float] | None, config: BatchConfig, seed: int):
        self.config = config
        self.streams = [Stream(split, config.sequence_length, seed + index) for index, split in enumerate(splits)]
        sizes = [float(stream.num_tokens) for stream in self.streams]
        weights = sizes if weights is None else list(weights)
        if len(weights) != len(splits):
            raise UserError(f"--data-weights must name one weight per data folder, got {len(weights)} for {len(splits)}")
        if any(not 0 < weight < float("inf") for weight in weights):
            raise UserError(f"--data-weights must be positive numbers, got {weights}")
        units = [max(1, round(weight / sum(weights) * _WEIGHT_UNITS)) for weight in weights]
        units[int(np.argmax(units))] += _WEIGHT_UNITS - sum(units)
        self.units = np.array(units, dtype=np.int64)

    @property
    def weights(self) -> list[float]:
        """The normalised mixing weights, one per store."""
        return (self.units / _WEIGHT_UNITS).tolist()

    def __getitem__(self, step: int) -> Batch:
        """All rows of optimizer step `step` (counted from 1)."""
        return self.rows(step, 0, self.config.rows)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of optimizer step `step` (counted from 1)."""
        return collate([self.streams[store].row(row) for store, row in self._rows(step, start, stop)])

    def documents(self, step: int, start: int, stop: int) -> list[tuple[int, list[int]]]:
        """Which (store index, document ids) the rows [start, stop) of a step are made of; names a bad batch."""
        return [(store, self.streams[store].row(row).documents) for store, row in self._rows(step, start, stop)]

    def mix(self, step: int) -> list[float]:
        """The share of the rows that each store has had after `step` steps."""
        total = step * self.config.rows
        return [count / total for count in _counts_before(self.units, total)]

    def _rows(self, step: int, start: int, stop: int) -> list[tuple[int, int]]:
        if step < 1 or not 0 <= start < stop <= self.config.rows:
            raise ValueError(f"rows must lie in step >= 1, 0 <= start < stop <= {self.config.rows}, got {step}, {start}, {stop}")
        first = (step - 1) * self.config.rows
        return interleave(self.units, first + start, first + stop)


def interleave(units: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """Which row of which store stands at the places [start, stop) of the mixed sequence.

    Row k of a store with weight w stands at time (k + 1/2) / w; the sequence is the rows of all stores in order of time. So after
    any number of rows every store is within one row or so of its share, and any part of the sequence costs the same to compute.

    Args:
        units: (stores,) int64, weights in millionths, adding up to a million.
    """
    before = max(0, start - len(units))  # at time t between t - stores/2 and t + stores/2 rows have passed
    counts = _counts_at(units, before)
    last = _counts_at(units, stop + len(units))
    stores = np.repeat(np.arange(len(units)), last - counts)
    rows = np.concatenate([np.arange(first, end) for first, end in zip(counts, last, strict=True)])
    times = (2 * rows + 1) * (_WEIGHT_UNITS / 2) / units[stores]
    order = np.lexsort((stores, times))[start - int(counts.sum()) :][: stop - start]
    return [(int(stores[i]), int(rows[i])) for i in order]


def _counts_at(units: np.ndarray, time: int) -> np.ndarray:
    return (2 * time * units + _WEIGHT_UNITS) // (2 * _WEIGHT_UNITS)


def _counts_before(units: np.ndarray, place: int) -> list[int]:
    before = max(0, place - len(units))
    counts = _counts_at(units, before)
    for store, _ in interleave(units, int(counts.sum()), place) if place > counts.sum() else []:
        counts[store] += 1
    return counts.tolist()


def validation_batches(split: Split, config: BatchConfig, rank: int, world_size: int, max_tokens: int | None) -> Iterator[Batch]:
    """One process's share of a split, in order, in rows of `sequence_length`, without wrapping round; the last row is filled with
    untrained zeros. `max_tokens` bounds what all processes read together."""
    length, total = config.sequence_length, min(len(split.tokens), max_tokens or len(split.tokens))
    order, ends = np.arange(len(split.offsets) - 1), np.asarray(split.offsets[1:]).astype(np.int64)
    rows = range(rank, -(-(total - 1) // length), world_size)
    for first in range(0, len(rows), config.micro_batch_size):
        pieces = []
        for index in rows[first : first + config.micro_batch_size]:
            row = read_row(split, order, ends, index * length, min(length + 1, total - index * length))
            padding = length + 1 - len(row.tokens)
            starts = np.pad(row.starts, (0, padding), constant_values=True)  # a padding token is a document of its own: no target
            pieces.append(Row(np.pad(row.tokens, (0, padding)), starts, row.documents))
        yield collate(pieces)


def prefetch(load: Callable[[int], Result], steps: Iterable[int]) -> Iterator[tuple[int, Result]]:
    """(step, load(step)) for every step; the next one is loaded by a thread while this one is used."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: list[tuple[int, Future[Result]]] = []
        for step in steps:
            waiting.append((step, pool.submit(load, step)))
            if len(waiting) == 2:
                ready, result = waiting.pop(0)
                yield ready, result.result()
        for ready, result in waiting:
            yield ready, result.result()


def collate(rows: Sequence[Row]) -> Batch:
    """Rows of T + 1 tokens -> a batch of (B, T); this is where targets are shifted, once."""
    tokens_BU = np.stack([row.tokens for row in rows])
    starts_BU = np.stack([row.starts for row in rows])
    targets = np.where(starts_BU[:, 1:], IGNORE, tokens_BU[:, 1:])
    starts = starts_BU[:, :-1].copy()
    starts[:, 0] = True  # a document that began in an earlier row begins anew here
    offsets = np.flatnonzero(starts)
    flat = np.arange(starts.size)
    positions = flat - offsets[np.cumsum(starts.reshape(-1)) - 1]
    return Batch(
        tokens=torch.from_numpy(tokens_BU[:, :-1].copy()),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions.reshape(starts.shape)),
        cu_seqlens=torch.from_numpy(np.append(offsets, starts.size).astype(np.int32)),
    )
