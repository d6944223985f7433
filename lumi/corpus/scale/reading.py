"""Stage 1: a unit of the input -> its outcomes in a cache, and beside them what the later stages need.

A unit leaves a folder with

    unit.json       facts of its source, and the documents in each part of the cache
    outcomes        the outcomes without documents and signatures, as Parquet
    signatures      (documents, views, permutations) uint32
    keys.npy        (rows, documents) uint64: a later task reads whole rows
    reasoning       (documents,) bool: where a document has reasoning

and its documents themselves in the cache, from which an interrupted task goes on.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow.parquet as pq

from lumi.config import write_json
from lumi.corpus.cache import SCHEMA, from_table, to_table
from lumi.corpus.corpus_writer import has_reasoning
from lumi.corpus.counts import SourceCounts
from lumi.corpus.deduplication import DeduplicationConfig
from lumi.corpus.processing import Outcome, process_batch
from lumi.corpus.scale.keys import count_rows, keys_of
from lumi.corpus.scale.signatures import shape_of
from lumi.corpus.scale.work import Work
from lumi.corpus.source_outcomes import process_source
from lumi.host.storage import atomic_folder
from lumi.host.workers import Workers

GROUP_OUTCOMES = 16_384  # in a row group of `outcomes`
TRANSPOSED = 65_536  # documents whose keys are turned at a time


def read_units(work: Work, rank: int, num_tasks: int) -> None:
    """Index every `num_tasks`-th unit, from `rank` on, unless that is done."""
    for number in range(rank, len(work.units), num_tasks):
        if not work.index(number).exists():
            with atomic_folder(work.index(number)) as folder:
                _index(work, number, folder)


def _index(work: Work, number: int, folder: Path) -> None:
    source, rules = work.units[number].source(work.config.sources), work.rules
    counts = SourceCounts(name=source.name, origin="")  # takes the facts; the stage that decides counts
    workers = Workers(process_batch, rules, 1)
    parts = []
    with (
        _OutcomesWriter(folder / "outcomes") as writer,
        open(folder / "signatures", "wb") as signatures,
        open(folder / "keys", "wb") as keys,
        open(folder / "reasoning", "wb") as reasoning,
    ):
        for outcomes in process_source(source, rules.filters.max_chars, work.cache(number), workers, counts):
            writer.add(outcomes)
            parts.append(_write_arrays(outcomes, work, signatures, keys, reasoning))
    _transpose(folder, sum(parts), work.config.deduplication)
    write_json(folder / "unit.json", {"facts": counts.facts, "parts": parts})


def _write_arrays(
    outcomes: Sequence[Outcome], work: Work, signatures: BinaryIO, keys: BinaryIO, reasoning: BinaryIO
) -> int:
    """Append the arrays of a batch; how many documents it has."""
    found = [outcome.fingerprint for outcome in outcomes if outcome.fingerprint is not None]
    data = b"".join(item.signature for item in found)
    signatures.write(data)
    rows = np.frombuffer(data, "<u4").reshape(shape_of(work, len(found)))
    keys.write(keys_of(found, rows, work.config.deduplication).tobytes())
    reasoning.write(bytes(has_reasoning(each.document) for each in outcomes if each.document is not None))
    return len(found)


def _transpose(folder: Path, num_documents: int, config: DeduplicationConfig) -> None:
    """`keys`, a row for each document, becomes keys.npy, a document for each column."""
    num_rows = count_rows(config)
    turned = np.lib.format.open_memmap(folder / "keys.npy", "w+", "<u8", (num_rows, num_documents))
    with open(folder / "keys", "rb") as file:
        for start in range(0, num_documents, TRANSPOSED):
            count = min(TRANSPOSED, num_documents - start)
            keys = np.fromfile(file, "<u8", count * num_rows)
            turned[:, start : start + count] = keys.reshape(count, num_rows).T
    turned.flush()
    (folder / "keys").unlink()


class _OutcomesWriter:
    """A context that collects outcomes without documents and signatures in one Parquet file."""

    def __init__(self, path: Path) -> None:
        self._file = pq.ParquetWriter(path, SCHEMA, compression="zstd")
        self._outcomes: list[Outcome] = []

    def __enter__(self) -> "_OutcomesWriter":
        return self

    def __exit__(self, *_: object) -> None:
        self._flush()
        self._file.close()

    def add(self, outcomes: Sequence[Outcome]) -> None:
        for outcome in outcomes:
            found = outcome.fingerprint and outcome.fingerprint._replace(signature=b"")
            self._outcomes.append(outcome._replace(document=None, fingerprint=found))
        if len(self._outcomes) >= GROUP_OUTCOMES:
            self._flush()

    def _flush(self) -> None:
        self._file.write_table(to_table(self._outcomes))
        self._outcomes = []


def read_outcomes(folder: Path) -> Iterator[list[Outcome]]:
    """The outcomes of a unit from its folder, in order, without documents and signatures."""
    with pq.ParquetFile(folder / "outcomes") as file:
        for group in range(file.num_row_groups):
            yield from_table(file.read_row_group(group), "texts")


class UnitOutcomes:
    """The outcomes of a unit with their documents, from its cache; one part of it is in memory."""

    def __init__(self, work: Work, number: int) -> None:
        self._cache = work.cache(number)
        self._ends = np.cumsum(work.facts(number)["parts"])
        self._part, self._outcomes = -1, list[Outcome]()

    def fetch(self, index: int) -> Outcome:
        """That of the document with this number, counted from 0 in the unit."""
        part = int(np.searchsorted(self._ends, index, side="right"))
        if part != self._part:
            found = self._cache.read_part(part)
            self._part, self._outcomes = part, [each for each in found if each.document is not None]
        return self._outcomes[index - int(self._ends[part])]
