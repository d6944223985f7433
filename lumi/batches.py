"""Token stores -> training batches, as pure functions of (seed, step).

Each store is an endless stream: its documents in a new order every epoch, one after the other. Row `i` of a store is the tokens
[i*T, (i+1)*T] of its stream (T inputs and, shifted by one, T targets), so every token is trained exactly once an epoch, and no
state but the step is needed to resume, with any number of processes. Rows of several stores are interleaved by their weights.

Documents in a row never see each other: `cu_seqlens` marks where each begins, positions restart there, and no target crosses it.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from lumi.config import UserError
from lumi.token_store import Split

IGNORE = -100  # a target that is not trained; torch's and the kernels' ignore_index
_WEIGHT_UNITS = 1_000_000  # mixing weights are rounded to millionths, so that interleaving is exact integer arithmetic


Result = TypeVar("Result")


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
    """One split of a store as an endless stream of documents, reshuffled every epoch (or in order, with `shuffle=False`)."""

    def __init__(self, split: Split, seed: int = 0, *, shuffle: bool = True):
        self.split, self.seed, self.shuffle = split, seed, shuffle
        self.lengths = np.diff(np.asarray(split.offsets).astype(np.int64))
        self.num_tokens = int(self.lengths.sum())
        if self.num_tokens == 0:
            raise UserError("a token store must hold at least one token, got an empty split")
        self._epoch = functools.lru_cache(maxsize=2)(self._order)

    def _order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """Document ids in this epoch's order, and where each ends in the epoch's stream."""
        count = len(self.lengths)
        order = np.random.default_rng([self.seed, epoch]).permutation(count) if self.shuffle else np.arange(count)
        return order, np.cumsum(self.lengths[order])

    def read(self, start: int, length: int) -> tuple[np.ndarray, np.ndarray, list[int]]:
        """Tokens [start, start + length) of the stream.

        Returns:
            tokens (length,) int64; starts (length,) bool, True where a document begins; the ids of the documents touched.
        """
        tokens, starts, documents = np.empty(length, dtype=np.int64), np.zeros(length, dtype=bool), []
        filled = 0
        while filled < length:
            epoch, place = divmod(start + filled, self.num_tokens)
            order, ends = self._epoch(epoch)
            index = int(np.searchsorted(ends, place, side="right"))
            while filled < length and index < len(order):
                document = int(order[index])
                skip = place - int(ends[index] - self.lengths[document])
                begin = int(self.split.offsets[document]) + skip
                count = min(int(self.lengths[document]) - skip, length - filled)
                if count > 0:
                    tokens[filled : filled + count] = self.split.tokens[begin : begin + count]
                    starts[filled] = skip == 0
                    documents.append(document)
                    filled, place = filled + count, place + count
                index += 1
        return tokens, starts, documents


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
        self.streams = [Stream(split, seed + index) for index, split in enumerate(splits)]
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
        length = self.config.sequence_length
        picked = self._rows(step, start, stop)
        return collate([self.streams[store].read(row * length, length + 1)[:2] for store, row in picked])

    def documents(self, step: int) -> list[tuple[int, list[int]]]:
        """Which (store index, document ids) the rows of a step are made of; names a bad batch."""
        length = self.config.sequence_length
        return [(store, self.streams[store].read(row * length, length + 1)[2]) for store, row in self._rows(step, 0, self.config.rows)]

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
    stream = Stream(split, shuffle=False)
    length = config.sequence_length
    total = min(stream.num_tokens, max_tokens or stream.num_tokens)
    rows = range(rank, -(-(total - 1) // length), world_size)
    for first in range(0, len(rows), config.micro_batch_size):
        pieces = []
        for row in rows[first : first + config.micro_batch_size]:
            tokens, starts, _ = stream.read(row * length, min(length + 1, total - row * length))
            padding = length + 1 - len(tokens)
            starts = np.pad(starts, (0, padding), constant_values=True)  # a padding token is a document of its own: no target
            pieces.append((np.pad(tokens, (0, padding)), starts))
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


def collate(rows: Sequence[tuple[np.ndarray, np.ndarray]]) -> Batch:
    """Rows of T+1 tokens and document starts -> a batch of (B, T); this is where targets are shifted, once.

    Args:
        rows: per row, tokens (T+1,) int64 and starts (T+1,) bool.
    """
    tokens_BU = np.stack([tokens for tokens, _ in rows])
    starts_BU = np.stack([starts for _, starts in rows])
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
