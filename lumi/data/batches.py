"""Token stores -> training batches, as pure functions of (seed, step).

The rows of each store (`lumi.data.rows`) are interleaved by the stores' weights. A run resumes from the step
alone, with any number of processes. From here on pre-training and fine-tuning take the same path; they differ
in which targets are trained.

Documents in a row never see each other: `cu_seqlens` marks where each begins, positions restart there, and no
target crosses the mark.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor

from lumi.config import UserError
from lumi.data.rows import TokenRow, make_rows, validation_rows
from lumi.data.token_store import Split

IGNORE = -100  # a target that is not trained: `ignore_index` in torch and in the kernels
# Mixing weights are rounded to millionths, so that interleaving is exact integer arithmetic.
_WEIGHT_UNITS = 1_000_000

Result = TypeVar("Result")


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """Sizes of a batch.

    Args:
        sequence_length: tokens of a row, at least 2.
        batch_tokens: tokens of one optimizer step, over all processes.
        micro_batch_size: rows that one process holds at a time; "auto": as many as fit into memory, on a CPU
            up to 16,384 tokens.
    """

    sequence_length: int = 1024
    batch_tokens: int = 65_536
    # Rows that one process holds at a time; "auto": as many as fit into memory, on a CPU up to 16,384 tokens.
    micro_batch_size: int | Literal["auto"] = 8

    def __post_init__(self) -> None:
        if self.sequence_length < 2:
            raise UserError("sequence_length", "must be at least 2", got=self.sequence_length)
        rows = 1 if self.micro_batch_size == "auto" else self.micro_batch_size
        if rows < 1:
            raise UserError("micro_batch_size", "must be at least 1", got=self.micro_batch_size)
        multiple = self.sequence_length * rows
        if self.batch_tokens < 1 or self.batch_tokens % multiple:
            raise UserError(
                "batch_tokens",
                f"must be a multiple of sequence_length x micro_batch_size = {multiple}",
                got=self.batch_tokens,
            )

    @property
    def rows(self) -> int:
        """Rows of one optimizer step, over all processes."""
        return self.batch_tokens // self.sequence_length

    @property
    def micro_batch_rows(self) -> int:
        """The micro-batch size as a number. `resolve_run` has replaced "auto" by then."""
        assert self.micro_batch_size != "auto"
        return self.micro_batch_size

    def micro_steps(self, data_size: int) -> int:
        """Micro-batches that each process runs in one step.

        Args:
            data_size: number of processes, or groups of processes, that read different rows.

        Raises:
            UserError: the rows of a step do not divide evenly.
        """
        if self.rows % (self.micro_batch_rows * data_size):
            sizes = f"{self.sequence_length} x {self.micro_batch_rows} x {data_size}"
            raise UserError(
                "batches.batch_tokens",
                f"must be a multiple of sequence_length x micro_batch_size x processes = {sizes}",
                got=self.batch_tokens,
            )
        return self.rows // (self.micro_batch_rows * data_size)


@dataclass(frozen=True)
class PairIndex:
    """Where the S conversations of a batch's S/2 pairs lie; in each pair the chosen one comes first.

    Attributes:
        documents: (S,) int64, which they are of all that the run reads: those of the first store come first.
        segments: (S,) int64, which of the spans of `cu_seqlens` they are.
    """

    documents: Tensor
    segments: Tensor


@dataclass(frozen=True)
class Batch:
    """B rows of T tokens.

    Attributes:
        tokens: (B, T) int64.
        targets: (B, T) int64, IGNORE where untrained.
        positions: (B, T) int64, from 0 in every document.
        cu_seqlens: (documents + 1,) int32, offsets of the documents in the B*T flattened tokens, from 0 to
            B*T. Every row begins a document.
        pairs: None where the documents are no pairs.
        plans: what a model's attention needs to know of the documents, by its windows
            (`Transformer.attention_plans`); None: the model makes it of `cu_seqlens`.
    """

    tokens: Tensor
    targets: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    pairs: PairIndex | None = None
    plans: Mapping[int | None, Any] | None = None

    @property
    def documents(self) -> Tensor | Mapping[int | None, Any]:
        """What a model takes: `plans`, or else `cu_seqlens`."""
        return self.cu_seqlens if self.plans is None else self.plans

    @property
    def num_targets(self) -> int:
        """What the loss is a mean over: trained targets, or pairs."""
        return int((self.targets != IGNORE).sum()) if self.pairs is None else len(self.pairs.documents) // 2

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`. Where its memory is pinned, nothing waits for the copy."""
        return _mapped(self, lambda tensor: tensor.to(device, non_blocking=device.type == "cuda"))

    def pinned(self) -> "Batch":
        """The same batch in pinned memory, which a GPU reads by itself."""
        return _mapped(self, Tensor.pin_memory)


class Batches:
    """The batches of a run: `batches[step]` is one optimizer step, `batches.rows(step, a, b)` a part of it.

    Args:
        splits: one per `--data-dirs`.
        weights: share of the rows for each split; normalised here. None: in proportion to the tokens.
        config: sizes.
        seed: of the shuffling.
    """

    def __init__(
        self, splits: Sequence[Split], weights: Sequence[float] | None, config: BatchConfig, seed: int
    ) -> None:
        self.config = config
        self.stores = [
            make_rows(split, config.sequence_length, seed + index) for index, split in enumerate(splits)
        ]
        weights = [float(rows.num_tokens) for rows in self.stores] if weights is None else list(weights)
        if len(weights) != len(splits):
            got = f"{len(weights)} for {len(splits)}"
            raise UserError("--data-weights", "must name one weight per data folder", got=got)
        if any(not 0 < weight < float("inf") for weight in weights):
            raise UserError("--data-weights", "must be positive numbers", got=weights)
        units = [max(1, round(weight / sum(weights) * _WEIGHT_UNITS)) for weight in weights]
        units[int(np.argmax(units))] += _WEIGHT_UNITS - sum(units)  # what rounding left over
        self.units = np.array(units, dtype=np.int64)
        ends = np.cumsum([split.num_documents for split in splits]).tolist()
        self._documents_before = [0, *ends] if splits[0].pairs else None

    @property
    def weights(self) -> list[float]:
        """The normalised mixing weights, one per store."""
        return (self.units / _WEIGHT_UNITS).tolist()

    def __getitem__(self, step: int) -> Batch:
        """All rows of optimizer step `step` (counted from 1)."""
        return self.rows(step, 0, self.config.rows)

    def rows(self, step: int, start: int, stop: int) -> Batch:
        """Rows [start, stop) of optimizer step `step` (counted from 1)."""
        places = self._rows(step, start, stop)
        before = self._documents_before
        return collate(
            [self.stores[store].row(row) for store, row in places],
            None if before is None else [before[store] for store, _ in places],
        )

    def documents(self, step: int, start: int, stop: int) -> list[tuple[int, list[int]]]:
        """(store index, document ids) of each of the rows [start, stop) of a step, to name a bad batch."""
        rows = self._rows(step, start, stop)
        return [(store, self.stores[store].row(row).documents) for store, row in rows]

    def mix(self, step: int) -> list[float]:
        """The share of the rows that each store has had after `step` steps."""
        total = step * self.config.rows
        return [count / total for count in _counts_before(self.units, total)]

    def _rows(self, step: int, start: int, stop: int) -> list[tuple[int, int]]:
        if step < 1 or not 0 <= start < stop <= self.config.rows:
            bounds = f"step >= 1, 0 <= start < stop <= {self.config.rows}"
            raise ValueError(f"rows must lie in {bounds}, got {step}, {start}, {stop}")
        first = (step - 1) * self.config.rows
        return interleave(self.units, first + start, first + stop)


def interleave(units: np.ndarray, start: int, stop: int) -> list[tuple[int, int]]:
    """The (store, row) at each of the places [start, stop) of the mixed sequence.

    Row k of a store with weight w has time (k + 1/2) / w, and the sequence is the rows of all stores in order
    of time. So after any number of rows every store is within about one row of its share, and every part of
    the sequence costs the same to compute.

    Args:
        units: (stores,) int64, weights in millionths, adding up to a million.
    """
    before = max(0, start - len(units))  # at time t, between t - stores/2 and t + stores/2 rows have passed
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
    """One process's share of a split, once, in a fixed order. The padding of the last rows is not trained.

    All processes get the same number of batches, because they must call a sharded model together. A process
    without rows left gets a batch without targets.

    Args:
        rank, size: of this process among those that read different rows.
        max_tokens: about how many tokens all processes may read together. None: the whole split.
    """
    count, read = validation_rows(split, config.sequence_length, max_tokens)
    mine = range(rank, count, size)
    for first in range(0, -(-count // size), config.micro_batch_rows):
        rows = [read(index) for index in mine[first : first + config.micro_batch_rows]]
        batch = collate(rows or [read(0)], [0] * max(len(rows), 1) if split.pairs else None)
        if not rows:
            none = PairIndex(*(torch.zeros(0, dtype=torch.int64) for _ in range(2))) if split.pairs else None
            batch = replace(batch, targets=torch.full_like(batch.targets, IGNORE), pairs=none)
        yield batch


def prefetch(load: Callable[[int], Result], steps: Iterable[int]) -> Iterator[tuple[int, Result]]:
    """(step, load(step)) for every step. A thread loads the next one while the caller uses this one."""
    with ThreadPoolExecutor(max_workers=1) as pool:
        waiting: list[tuple[int, Future[Result]]] = []
        for step in steps:
            waiting.append((step, pool.submit(load, step)))
            if len(waiting) == 2:
                ready, result = waiting.pop(0)
                yield ready, result.result()
        for ready, result in waiting:
            yield ready, result.result()


def collate(rows: Sequence[TokenRow], documents_before: Sequence[int] | None = None) -> Batch:
    """Rows of T + 1 tokens -> a batch of (B, T). Targets are shifted here and nowhere else.

    Args:
        documents_before: of pairs, for each row: how many documents the stores before its own hold.
    """
    tokens_BU = np.stack([row.tokens for row in rows])
    starts_BU = np.stack([row.starts for row in rows])
    trained_BU = np.stack([row.trained for row in rows])
    targets = np.where(starts_BU[:, 1:] | ~trained_BU[:, 1:], IGNORE, tokens_BU[:, 1:])
    starts = starts_BU[:, :-1].copy()
    starts[:, 0] = True  # the rest of a document from an earlier row is a document of its own
    offsets = np.flatnonzero(starts)
    flat = np.arange(starts.size)
    positions = flat - offsets[np.cumsum(starts.reshape(-1)) - 1]
    return Batch(
        tokens=torch.from_numpy(tokens_BU[:, :-1].copy()),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(positions.reshape(starts.shape)),
        cu_seqlens=torch.from_numpy(np.append(offsets, starts.size).astype(np.int32)),
        pairs=None if documents_before is None else _index_pairs(rows, starts, documents_before),
    )


def _mapped(held: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """The same with every tensor mapped, in dataclasses and dictionaries too."""
    if isinstance(held, Tensor):
        return function(held)
    if isinstance(held, dict):
        return {name: _mapped(value, function) for name, value in held.items()}
    if is_dataclass(held) and not isinstance(held, type):
        return replace(held, **_mapped(vars(held), function))
    return held


def _index_pairs(
    rows: Sequence[TokenRow], starts_BT: np.ndarray, documents_before: Sequence[int]
) -> PairIndex:
    spans_B = starts_BT.sum(axis=1)  # the padding is the last one of its row
    firsts_B = np.cumsum(spans_B) - spans_B
    documents = [np.array(row.documents) + num for row, num in zip(rows, documents_before, strict=True)]
    segments = [first + np.arange(len(row.documents)) for row, first in zip(rows, firsts_B, strict=True)]
    return PairIndex(*(torch.from_numpy(np.concatenate(each)) for each in (documents, segments)))
