"""Stage 4: the kept documents -> the shards, each by itself; stage 5: all of them become the corpus."""

import os
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np

from lumi.config import read_json, write_json
from lumi.corpus.corpus_writer import CorpusWriter, publish
from lumi.corpus.folder import SCHEMAS, WITH_REASONING, attributed
from lumi.corpus.output_folder import sweep_cache
from lumi.corpus.processing import Outcome
from lumi.corpus.report import CARD, PAGE, data_card
from lumi.corpus.scale.reading import UnitOutcomes
from lumi.corpus.scale.work import Work
from lumi.host.storage import remove_folder


def write_shards(work: Work, rank: int, num_tasks: int) -> None:
    """Write every `num_tasks`-th shard, from `rank` on, unless that is done."""
    work.shards.mkdir(exist_ok=True)
    plan = _plan(work)
    for number in range(rank, len(plan), num_tasks):
        record = work.shards / f"{number:05d}.json"
        if not record.exists():
            write_json(record, _write_shard(work, number, plan))


def _plan(work: Work) -> list[dict[str, Any]]:
    return read_json(work.decisions / "shards.json")


def _write_shard(work: Work, number: int, plan: list[dict[str, Any]]) -> dict[str, Any]:
    """Its entry in the manifest."""
    first, end = ([shard["first"] for shard in plan] + [int(work.offsets[-1])])[number : number + 2]
    folder = work.shards / f"building-{number:05d}"
    writer = CorpusWriter(
        folder,
        work.config.shard_bytes,
        work.config.holds,
        first_shard=number,
        with_reasoning=plan[number]["with_reasoning"],
        columns=work.config.columns,
    )
    with writer:
        for outcome, source in _kept_documents(work, first, end):
            assert outcome.document is not None
            writer.add(outcome.document, source, outcome.num_bytes, outcome.attribution)
        (shard,) = writer.finish(with_reasoning=plan[-1]["with_reasoning"])
        os.replace(writer.building / shard["file"], work.shards / shard["file"])
    shutil.rmtree(folder)
    return shard


def _kept_documents(work: Work, first: int, end: int) -> Iterator[tuple[Outcome, str]]:
    """(outcome, name of its source) of what is kept between the documents `first` and `end`."""
    kept = np.load(work.decisions / "kept.npy", mmap_mode="r")
    documents = first + np.flatnonzero(kept[first:end])
    units = np.searchsorted(work.offsets, documents, side="right") - 1
    for unit in np.unique(units).tolist():
        source, outcomes = work.config.sources[work.units[unit].source_index], UnitOutcomes(work, unit)
        for index in (documents[units == unit] - work.offsets[unit]).tolist():
            yield outcomes.fetch(index), source.name


def publish_corpus(work: Work, _rank: int, _num_tasks: int) -> None:
    """Move the shards into the corpus folder, and delete what the tasks have left but for the caches."""
    plan = _plan(work)
    shards = [read_json(work.shards / f"{number:05d}.json") for number in range(len(plan))]
    schemas = WITH_REASONING if plan[-1]["with_reasoning"] else SCHEMAS
    schema = attributed(schemas[work.config.holds], work.config.columns)
    manifest = read_json(work.decisions / "manifest.json")
    page = (work.decisions / PAGE).read_bytes().decode()
    pages = {CARD: data_card(manifest), PAGE: page}
    publish(work.output, work.shards, shards, schema, manifest, pages)
    remove_folder(work.folder)
    sweep_cache(work.output, [work.logs, *(cache.folder for cache in work.caches)])
