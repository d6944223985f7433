"""Token stores -> training batches, as pure functions of (seed, step).

The rows of each store (`lumi.data.rows`) are interleaved by the stores' weights. No state but the step is needed to resume, with any number
of processes. Pre-training and fine-tuning take the same path from here on: they differ in which targets count.

Documents in a row never see each other: `cu_seqlens` marks where each begins, positions restart there, and no target crosses it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lumi.config import UserError
from lumi.data.rows import Row, make_rows, validation_rows
from lumi.data.token_store import Split

IGNORE = -100  # a target that is not trained; torch's and the kernels' ignore_index
_WEIGHT_UNITS = (
    1_000_000  # mixing weights are rounded to millionths, so that interleaving is exact integer arithmetic
)


Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of a batch. `batch_tokens` counts the tokens of one optimizer step over all processes."""

    sequence_length: int = 1024
    batch_tokens: int = 65_536
    micro_batch_size: int | Literal["auto"] = (
        8  # rows that one process holds at a time; "auto": as many as fit into memory
    )

    def __post_init__(self):
        if self.sequence_length < 2:
            raise ValueError(f"sequence_length must be at least 2, got {self.sequence_length}")
        rows = 1 if self.micro_batch_size == "auto" else self.micro_batch_size
        if rows < 1:
            raise ValueError(f"micro_batch_size must be at least 1, got {self.micro_batch_size}")
        if self.batch_tokens < 1 or self.batch_tokens % (self.sequence_length * rows):
            raise ValueError(
                f"batch_tokens must be a multiple of sequence_length x micro_batch_size = {self.sequence_length * rows}, "
                f"got {self.batch_tokens}"
            )

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_tokens // self.sequence_length

    @property
    def micro_batch_rows(self) -> int:
        """The micro-batch size, which `lumi.training.preflight` has chosen where it was "auto"."""
        assert self.micro_batch_size != "auto"
        return self.micro_batch_size

    def micro_steps(self, data_size: int) -> int:
        """Micro-batches that a process runs in a step, where `data_size` of them (or groups of them) read different rows. Raises
        UserError where they do not come out even."""
        if self.rows % (self.micro_batch_rows * data_size):
            raise UserError(
                f"batches.batch_tokens must be a multiple of sequence_length x micro_batch_size x processes = "
                f"{self.sequence_length} x {self.micro_batch_rows} x {data_size}, got {self.batch_tokens}"
            )
        return self.rows // (self.micro_batch_rows * data_size)


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
        return Batch(
            *(
                t.to(device, non_blocking=True)
                for t in (self.tokens, self.targets, self.positions, self.cu_seqlens)
            )
        )


class Batches:
    """The training batches of a run: `batches[step]` is one whole optimizer step, `batches.rows(step, a, b)` a part of it.

    Args:
        splits: one per `--data-dirs`.
        weights: share of the rows that each gets; normalised here. None: in proportion to the tokens.
        config: sizes.
        seed: of the shuffling.
    """

    def __init__(
        self, splits: Sequence[Split], weights: Sequence[float] | None, config: BatchConfig, seed: int
    ):
        self.config = config
        self.stores = [
            make_rows(split, config.sequence_length, seed + index) for index, split in enumerate(splits)
        ]
        sizes = [float(rows.num_tokens) for rows in self.stores]
        weights = sizes if weights is None else list(weights)
        if len(weights) != len(splits):
            raise UserError(
                f"--data-weights must name one weight per data folder, got {len(weights)} for {len(splits)}"
            )
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
        return collate([self.stores[store].row(row) for store, row in self._rows(step, start, stop)])

    def documents(self, step: int, start: int, stop: int) -> list[tuple[int, list[int]]]:
        """Which (store index, document ids) the rows [start, stop) of a step are made of; names a bad batch."""
        return [
            (store, self.stores[store].row(row).documents) for store, row in self._rows(step, start, stop)
        ]

    def mix(self, step: int) -> list[float]:
        """The share of the rows that each store has had after `step` steps."""
        total = step * self.config.rows
        return [count / total for count in _counts_before(self.units, total)]

    def _rows(self, step: int, start: int, stop: int) -> list[tuple[int, int]]:
        if step < 1 or not 0 <= start < stop <= self.config.rows:
            raise ValueError(
                f"rows must lie in step >= 1, 0 <= start < stop <= {self.config.rows}, got {step}, {start}, {stop}"
            )
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


def validation_batches(
    split: Split, config: BatchConfig, rank: int, size: int, max_tokens: int | None
) -> Iterator[Batch]:
    """One process's share of a split, in a fixed order, without wrapping round; what fills the last rows is not trained. `max_tokens`
    bounds what all processes read together. All `size` of them get the same number of batches, for a sharded model is called by all
    together: one that has no row left gets one without targets."""
    count, read = validation_rows(split, config.sequence_length, max_tokens)
    mine = range(rank, count, size)
    for first in range(0, -(-count // size), config.micro_batch_rows):
        if rows := mine[first : first + config.micro_batch_rows]:
            yield collate([read(index) for index in rows])
        else:
            filler = collate([read(0)])
            yield replace(filler, targets=torch.full_like(filler.targets, IGNORE))


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
    """Rows of T + 1 tokens -> a batch of (B, T); this is where targets are shifted and masked, once."""
    tokens_BU = np.stack([row.tokens for row in rows])
    starts_BU = np.stack([row.starts for row in rows])
    trained_BU = np.stack([row.trained for row in rows])
    targets = np.where(starts_BU[:, 1:] | ~trained_BU[:, 1:], IGNORE, tokens_BU[:, 1:])
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
