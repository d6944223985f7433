"""The stage `prepare`: sources -> cleaned, filtered, de-duplicated documents in a corpus folder."""

from collections.abc import Sequence
from contextlib import closing
from functools import partial
from pathlib import Path

from lumi.config import UserError
from lumi.corpus import processing
from lumi.corpus.cache import SourceCache
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.counts import SourceCounts
from lumi.corpus.deduplication import Deduplicator
from lumi.corpus.documents import Document
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
from lumi.corpus.processing import Outcome
from lumi.corpus.report import (
    CARD,
    PAGE,
    data_card,
    noun,
    print_made,
    print_report,
    print_up_to_date,
    print_warnings,
)
from lumi.corpus.report_page import GENERATOR, report_page
from lumi.corpus.review import Review
from lumi.corpus.selection import check_not_empty, select, summarize
from lumi.corpus.source_outcomes import inputs_key, open_cache, process_source, rules_of, source_keys
from lumi.corpus.sources import describe
from lumi.host.page import is_page, write_page
from lumi.host.progress import progress_bar
from lumi.host.storage import check_output_file
from lumi.host.workers import Workers, num_cores


def prepare(
    config: PrepareConfig,
    output_dir: str | Path,
    *,
    use_cache: bool = False,
    analyze_only: bool = False,
    num_workers: int | None = None,
    report: Path | None = None,
) -> Manifest:
    """Make a corpus folder; its shards are the same bytes for any number of workers.

    Args:
        config: sources, filters, budgets.
        output_dir: a new or empty folder, or a corpus folder of the same config (with `use_cache`: of any
            config).
        use_cache: reuse what an earlier or interrupted run left in `output_dir/.cache`; otherwise begin anew.
        analyze_only: print what would be kept and dropped, and write nothing.
        num_workers: processes for cleaning, filters and fingerprints; None: one for each usable core.
        report: with `analyze_only`, the file for the page that a corpus folder holds as DATA_REPORT.html.

    Returns:
        The manifest; with `analyze_only` the manifest that a run would write, without shards.

    Raises:
        UserError: a source or an evaluation set cannot be read, the folder holds something else, no document
            is kept, the disk is full.
    """
    if report is not None:
        _check_report(report, analyze_only)
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
            return _analyze(config, sets, caches if use_cache else {}, workers, report)
        old = earlier_corpus(folder, config, use_cache)
        with full_disk_refused(folder):
            return _write(config, sets, folder, keys, caches, workers, old if use_cache else None, use_cache)


def _check_report(report: Path, analyze_only: bool) -> None:
    if not analyze_only:
        remedy = f"leave it out: the corpus folder gets {PAGE}"
        raise UserError("--report", "must come with --analyze-only", got=report, remedy=remedy)
    is_ours = partial(is_page, generator=GENERATOR)
    check_output_file(report, "new, or a page that `lumi prepare` wrote", is_ours, "--report")


def _analyze(
    config: PrepareConfig,
    sets: Sequence[EvaluationSet],
    caches: dict[str, SourceCache],
    workers: Workers,
    report: Path | None,
) -> Manifest:
    review = Review()
    manifest = summarize(config, _run(config, caches, workers, None, review), sets)
    print_warnings(manifest)
    if report is not None:
        write_page(report, report_page(manifest, review))
    written = "nothing" if report is None else f"nothing but {report}"
    print_report(manifest, f"{written} was written; {manifest['documents']:,} {noun(manifest)} would be")
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
        with CorpusWriter(folder, config.shard_bytes, config.holds, columns=config.columns) as writer:
            review = Review()
            manifest = summarize(config, _run(config, caches, workers, writer, review), sets)
            manifest |= {"inputs_key": inputs}
            print_warnings(manifest)
            check_not_empty(manifest)
            pages = {CARD: data_card(manifest), PAGE: report_page(manifest, review)}
            manifest = writer.commit(manifest, pages)
        sweep_cache(folder, [cache.folder for cache in caches.values()])
    print_made(folder, manifest)
    return manifest


def _run(
    config: PrepareConfig,
    caches: dict[str, SourceCache],
    workers: Workers,
    writer: CorpusWriter | None,
    review: Review,
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
                read = partial(_document, outcomes)
                for place in select(
                    outcomes, duplicates, source, config.bytes_per_token, counts, review, read
                ):
                    document = read(place)
                    assert document is not None
                    if writer is not None:
                        outcome = outcomes[place]
                        writer.add(document, source.name, outcome.num_bytes, outcome.attribution)
                bar.set_postfix(kept=counts.kept, refresh=False)
                bar.update(counts.read - before)
                if counts.budget_reached:
                    break
        all_counts.append(counts)
    return all_counts


def _document(outcomes: Sequence[Outcome], place: int) -> Document | None:
    return outcomes[place].document
