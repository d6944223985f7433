"""Stage 3: one pass in document order. It decides what is kept, as one process would, and where shards end.

It leaves a folder with

    kept.npy        (documents,) bool
    shards.json     the first document of each shard, and whether reasoning has occurred before its end
    manifest.json   the manifest of the corpus, without shards
    DATA_REPORT.html
"""

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from lumi.config import write_json
from lumi.corpus.corpus_writer import ShardLayout
from lumi.corpus.counts import SourceCounts
from lumi.corpus.deduplication import Deduplicator, Fingerprint
from lumi.corpus.documents import Document
from lumi.corpus.processing import Outcome
from lumi.corpus.report import PAGE
from lumi.corpus.report_page import report_page
from lumi.corpus.review import Review
from lumi.corpus.scale.keys import count_bands, hash_fields
from lumi.corpus.scale.reading import UnitOutcomes, read_outcomes
from lumi.corpus.scale.sharing import SharedKeys
from lumi.corpus.scale.signatures import Signatures
from lumi.corpus.scale.work import Work
from lumi.corpus.selection import check_not_empty, select, summarize
from lumi.corpus.sources import describe
from lumi.host.page import write_page
from lumi.host.storage import atomic_folder


def decide(work: Work, _rank: int, _num_tasks: int) -> None:
    """Decide about all documents, unless that is done. Raises UserError if none is kept."""
    if work.decisions.exists():
        return
    kept, plan = np.zeros(work.offsets[-1], dtype=bool), ShardPlan(work.config.shard_bytes)
    duplicates, review = _Duplicates(work), Review()
    all_counts = []
    for index, source in enumerate(work.config.sources):
        counts = SourceCounts(name=source.name, origin=describe(source))
        units = [number for number, unit in enumerate(work.units) if unit.source_index == index]
        for number in units:
            counts.facts |= work.facts(number)["facts"]
            _decide_unit(work, number, counts, duplicates, review, kept, plan)
            if counts.budget_reached:
                break
        all_counts.append(counts)
    manifest = summarize(work.config, all_counts, work.sets) | {"inputs_key": work.inputs_key}
    check_not_empty(manifest)
    with atomic_folder(work.decisions) as folder:
        np.save(folder / "kept.npy", kept)
        write_json(folder / "shards.json", plan.shards)
        write_json(folder / "manifest.json", manifest)
        write_page(folder / PAGE, report_page(manifest, review))


def _decide_unit(
    work: Work,
    number: int,
    counts: SourceCounts,
    duplicates: "_Duplicates",
    review: Review,
    kept: "npt.NDArray[np.bool_]",
    plan: "ShardPlan",
) -> None:
    source = work.config.sources[work.units[number].source_index]
    reasoning = np.fromfile(work.index(number) / "reasoning", dtype=bool)
    begin = first = int(work.offsets[number])
    whole = UnitOutcomes(work, number)

    def read(present: "npt.NDArray[np.bool_]", first: int, place: int) -> Document | None:
        if not present[place]:
            return None
        return whole.fetch(first - begin + int(present[:place].sum())).document

    for outcomes in read_outcomes(work.index(number)):
        present = np.array([outcome.fingerprint is not None for outcome in outcomes])
        documents = first + np.cumsum(present) - 1  # of those places that have one
        reasons = duplicates.find(outcomes, first)
        read_place = partial(read, present, first)
        for place in select(
            outcomes, reasons, source, work.config.bytes_per_token, counts, review, read_place
        ):
            document = int(documents[place])
            kept[document] = True
            plan.add(document, outcomes[place].num_bytes, has_reasoning=bool(reasoning[document - begin]))
        if counts.budget_reached:
            return
        first += int(present.sum())


class _Duplicates:
    """The rule of one process, told only of what documents share: the rest is neither read nor remembered."""

    def __init__(self, work: Work) -> None:
        config = work.config.deduplication
        has_parts = work.config.conversation_filters is not None
        self._deduplicator = Deduplicator(config, has_parts=has_parts)
        self._num_bands, self._fields = count_bands(config), hash_fields(config)
        self._shared, self._signatures = SharedKeys(work), Signatures(work)

    def find(self, outcomes: Sequence[Outcome], first: int) -> Iterator[str]:
        """The reason to drop each outcome as a duplicate, or ""; its documents are numbered from `first`."""
        found = [outcome.fingerprint for outcome in outcomes if outcome.fingerprint is not None]
        self._shared.take(first)  # documents beyond the budget of an earlier source
        rows = self._shared.take(first + len(found))
        shared = [Fingerprint(b"", b"", b"")] * len(found)
        for field, row in zip(self._fields, rows[self._num_bands :], strict=True):
            for place in (row["document"] - first).tolist():
                shared[place] = shared[place]._replace(**{field: getattr(found[place], field)})
        hashes = _by_document(rows[: self._num_bands], first, len(found))
        near = np.array([place for place, each in enumerate(hashes) if len(each)], dtype=np.int64)
        for place, signature in zip(near.tolist(), self._signatures.fetch(first + near), strict=True):
            shared[place] = shared[place]._replace(signature=signature.tobytes())
        known = iter(shared)
        prints = [outcome.fingerprint and next(known) for outcome in outcomes]
        return self._deduplicator.decide(prints, hashes)


def _by_document(
    rows: Sequence["npt.NDArray[np.void]"], first: int, count: int
) -> list["npt.NDArray[np.uint64]"]:
    """The keys of each of `count` documents, numbered from `first`, out of the entries of rows."""
    if not rows:
        return [np.empty(0, dtype=np.uint64)] * count
    entries = np.concatenate(rows)
    entries = entries[np.argsort(entries["document"], kind="stable")]
    ends = np.searchsorted(entries["document"], first + np.arange(1, count))
    return np.split(entries["key"], ends) if count else []


class ShardPlan:
    """Where each shard begins, for documents that are added in order: what `CorpusWriter` would do."""

    def __init__(self, shard_bytes: int) -> None:
        self.shards: list[dict[str, Any]] = []
        self._layout = ShardLayout(shard_bytes)
        self._is_open = self._with_reasoning = False

    def add(self, document: int, num_bytes: int, *, has_reasoning: bool) -> None:
        """Add the document with this number."""
        if has_reasoning and not self._with_reasoning:
            self._layout.begin_shard()
            self._is_open, self._with_reasoning = False, True
        if not self._is_open:
            self.shards.append({"first": document, "with_reasoning": self._with_reasoning})
        self._is_open = self._layout.add(num_bytes) != "shard"
