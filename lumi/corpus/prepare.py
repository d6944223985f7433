"""The stage `prepare`: sources -> cleaned, filtered, de-duplicated documents in a corpus folder."""

from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from lumi.corpus import processing
from lumi.corpus.cache import SourceCache
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.counts import SourceCounts
from lumi.corpus.deduplication import Deduplicator
from lumi.corpus.evaluation_sets import EvaluationSet, read_evaluation_sets
from lumi.corpus.folder import Manifest
from lumi.corpus.output_folder import (
    discard_caches,
    earlier_corpus,
    full_disk_refused,
    interruptible,
    is_up_to_date,
    lock,
    sweep_cache,
)
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.report import data_card, noun, print_made, print_report, print_up_to_date, print_warnings
from lumi.corpus.selection import check_not_empty, select, summarize
from lumi.corpus.source_outcomes import inputs_key, open_cache, process_source, rules_of, source_keys
from lumi.corpus.sources import describe
from lumi.host.progress import progress_bar
from lumi.host.workers import Workers, num_cores


def prepare(
    config: PrepareConfig,
    output_dir: str | Path,
    *,
    use_cache: bool = False,
    analyze_only: bool = False,
    num_workers: int | None = None,
) -> Manifest:
    """Make a corpus folder; its shards are the same bytes for any number of workers.

    Args:
        config: sources, filters, budgets.
        output_dir: a new or empty folder, or a corpus folder of the same config (with `use_cache`: of any
            config).
        use_cache: reuse what an earlier or interrupted run left in `output_dir/.cache`; otherwise begin anew.
        analyze_only: print what would be kept and dropped, and write nothing.
        num_workers: processes for cleaning, filters and fingerprints; None: one for each usable core.

    Returns:
        The manifest; with `analyze_only` the manifest that a run would write, without shards.

    Raises:
        UserError: a source or an evaluation set cannot be read, the folder holds something else, no document
            is kept, the disk is full.
    """
    sets = read_evaluation_sets(config.decontamination)
    all_workers = Workers(
        processing.process_batch, rules_of(config, sets), num_cores() if num_workers is None else num_workers
    )
    folder = Path(output_dir)
    keys = source_keys(config, sets)
    caches = {
        source.name: open_cache(folder, source, keys[source.name], writable=not analyze_only)
        for source in config.sources
    }
    with interruptible(writes=not analyze_only), all_workers as workers:
        if analyze_only:
            return _analyze(config, sets, caches if use_cache else {}, workers)
        old = earlier_corpus(folder, config, use_cache)
        with full_disk_refused(folder):
            return _write(config, sets, folder, keys, caches, workers, old if use_cache else None, use_cache)


def _analyze(
    config: PrepareConfig, sets: Sequence[EvaluationSet], caches: dict[str, SourceCache], workers: Workers
) -> Manifest:
    manifest = summarize(config, _run(config, caches, workers, None), sets)
    print_warnings(manifest)
    print_report(manifest, f"nothing was written; {manifest['documents']:,} {noun(manifest)} would be")
    return manifest


def _write(
    config: PrepareConfig,
    sets: Sequence[EvaluationSet],
    folder: Path,
    keys: dict[str, str],
    caches: dict[str, SourceCache],
    workers: Workers,
    old: Manifest | None,
    use_cache: bool,
) -> Manifest:
    inputs = inputs_key(config, keys)
    with lock(folder):
        if old is not None and is_up_to_date(folder, old, inputs):
            print_up_to_date(folder, old)
            return old
        if not use_cache:
            discard_caches(folder, caches.values())
        with CorpusWriter(folder, config.shard_bytes, config.holds) as writer:
            manifest = summarize(config, _run(config, caches, workers, writer), sets)
            manifest |= {"inputs_key": inputs}
            print_warnings(manifest)
            check_not_empty(manifest)
            manifest = writer.commit(manifest, data_card(manifest))
        sweep_cache(folder, [cache.folder for cache in caches.values()])
    print_made(folder, manifest)
    return manifest


def _run(
    config: PrepareConfig, caches: dict[str, SourceCache], workers: Workers, writer: CorpusWriter | None
) -> list[SourceCounts]:
    """Take every source in order until its budget is reached; find duplicates one document at a time."""
    deduplicator = Deduplicator(config.deduplication, has_parts=config.conversation_filters is not None)
    all_counts = []
    for source in config.sources:
        counts = SourceCounts(name=source.name, origin=describe(source))
        max_chars = config.rules.filters.max_chars
        batches = process_source(source, max_chars, caches.get(source.name), workers, counts)
        with closing(batches), progress_bar(source.name, " documents") as bar:
            for outcomes in batches:
                before = counts.read
                duplicates = deduplicator.decide([outcome.fingerprint for outcome in outcomes])
                for place in select(outcomes, duplicates, source, config.bytes_per_token, counts):
                    document = outcomes[place].document
                    assert document is not None
                    if writer is not None:
                        writer.add(document, source.name, outcomes[place].num_bytes)
                bar.set_postfix(kept=counts.kept, refresh=False)
                bar.update(counts.read - before)
                if counts.budget_reached:
                    break
        all_counts.append(counts)
    return all_counts
