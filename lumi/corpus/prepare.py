"""The stage `prepare`: sources -> cleaned, filtered, de-duplicated documents in a corpus folder."""

import contextlib
import importlib.metadata
import re
import shutil
import signal
import sys
import threading
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from pathlib import Path

from lumi.config import UserError, to_dict
from lumi.corpus import processing
from lumi.corpus.cache import SourceCache, cache_key
from lumi.corpus.corpus_writer import CorpusWriter
from lumi.corpus.counts import SourceCounts
from lumi.corpus.deduplication import Deduplicator
from lumi.corpus.filters import classifier
from lumi.corpus.folder import CorpusReader, Manifest, read_manifest
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.processing import Outcome, make_batches
from lumi.corpus.reading import open_source
from lumi.corpus.report import data_card, find_warnings, noun, summary_table, unused_fields
from lumi.corpus.sources import Source, describe, identify
from lumi.host.progress import progress_bar
from lumi.host.storage import check_output
from lumi.host.workers import Workers, num_cores

CACHE_FORMAT = 5  # raise it when cleaning, filters or fingerprints change their results
OURS = re.compile(r"shard-\d+-[0-9a-f]{8}\.parquet|DATA_CARD\.md|manifest\.json\.tmp-\d+|\.cache|\.building")


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
        UserError: a source cannot be read, the folder holds something else, no document is kept, the disk
            is full.
    """
    rules = config.rules
    all_workers = Workers(
        processing.process_batch, rules, num_cores() if num_workers is None else num_workers
    )
    folder = Path(output_dir)
    if rules.filters.languages is not None:
        classifier(rules.filters.languages)  # refuses an unknown language before any work
    keys = {source.name: _source_key(source, config) for source in config.sources}
    caches = {
        source.name: SourceCache(
            folder / ".cache" / f"{source.name}-{keys[source.name]}",
            kind=source.holds,
            writable=not analyze_only,
        )
        for source in config.sources
    }
    with _interruptible(writes=not analyze_only), all_workers as workers:
        if analyze_only:
            return _analyze(config, caches if use_cache else {}, workers)
        old = _check_output(folder, config, use_cache)
        try:
            return _write(config, folder, keys, caches, workers, old if use_cache else None, use_cache)
        except OSError as error:
            reason = error.strerror or str(error)
            raise UserError(
                f"{error.filename or folder} cannot be written: {reason}",
                remedy="finished batches are kept: mend this, then run again with --use-cache",
            ) from error


def _analyze(config: PrepareConfig, caches: dict[str, SourceCache], workers: Workers) -> Manifest:
    manifest = _summarize(config, _run(config, caches, workers, None))
    _report(manifest)
    print(f"nothing was written; {manifest['documents']:,} {noun(manifest)} would be")
    return manifest


def _write(
    config: PrepareConfig,
    folder: Path,
    keys: dict[str, str],
    caches: dict[str, SourceCache],
    workers: Workers,
    old: Manifest | None,
    use_cache: bool,
) -> Manifest:
    folder.mkdir(parents=True, exist_ok=True)
    inputs_key = cache_key([to_dict(config), keys])
    with _lock(folder):
        if old is not None and old.get("inputs_key") == inputs_key and _is_whole(folder, old):
            _report(old)
            print(f"{folder} is up to date: {old['documents']:,} {noun(old)}")
            return old
        if not use_cache:
            _discard(folder, caches)
        with CorpusWriter(folder, config.shard_bytes, config.holds) as writer:
            manifest = _summarize(config, _run(config, caches, workers, writer)) | {"inputs_key": inputs_key}
            if not manifest["documents"]:
                raise UserError(
                    "sources",
                    "must give at least one document that is kept",
                    got=f"none: {'; '.join(manifest['warnings'])}",
                    remedy="see what each filter drops with --analyze-only, and loosen it",
                )
            manifest = writer.commit(manifest, data_card(manifest))
        in_use = [cache.folder for cache in caches.values()]
        for path in (folder / ".cache").iterdir():  # runs of other configs may have left more
            if path.is_dir() and path not in in_use:
                shutil.rmtree(path)
    _report(manifest)
    shards = "1 shard" if len(manifest["shards"]) == 1 else f"{len(manifest['shards'])} shards"
    made = f"{manifest['documents']:,} {noun(manifest)} in {shards}"
    print(f"{made}: {folder} ({folder}/.cache may be deleted)")
    return manifest


def _report(manifest: Manifest) -> None:
    print("\n".join([summary_table(manifest), *unused_fields(manifest)]))


def _discard(folder: Path, caches: dict[str, SourceCache]) -> None:
    """Clear the caches; say so where they are what an interrupted run left."""
    if not (folder / "manifest.json").exists() and any(cache.folder.exists() for cache in caches.values()):
        lost = f"{folder}: what an interrupted run left is discarded; --use-cache goes on from it"
        print(f"lumi: {lost}", file=sys.stderr)
    for cache in caches.values():
        cache.clear()


def _run(
    config: PrepareConfig, caches: dict[str, SourceCache], workers: Workers, writer: CorpusWriter | None
) -> list[SourceCounts]:
    """Take every source in order until its budget is reached; find duplicates one document at a time."""
    deduplicator = Deduplicator(config.deduplication, has_parts=config.conversation_filters is not None)
    all_counts = []
    for source in config.sources:
        counts = SourceCounts(name=source.name, origin=describe(source))
        max_chars = config.rules.filters.max_chars
        batches = _process_source(source, max_chars, caches.get(source.name), workers, counts)
        with closing(batches), progress_bar(source.name, " documents") as bar:
            for outcomes in batches:
                before = counts.read
                _take(outcomes, source, config, counts, deduplicator, writer)
                bar.set_postfix(kept=counts.kept, refresh=False)
                bar.update(counts.read - before)
                if counts.budget_reached:
                    break
        all_counts.append(counts)
    return all_counts


def _take(
    outcomes: Sequence[Outcome],
    source: Source,
    config: PrepareConfig,
    counts: SourceCounts,
    deduplicator: Deduplicator,
    writer: CorpusWriter | None,
) -> None:
    """Count and write a batch, up to the document that reaches the budget."""
    duplicates = deduplicator.decide([outcome.fingerprint for outcome in outcomes])
    for outcome, duplicate in zip(outcomes, duplicates, strict=True):
        counts.note_unused(outcome.unused)
        if outcome.document is None or duplicate:
            counts.drop(outcome.reason or duplicate, outcome.detail)
            continue
        counts.keep(outcome.num_bytes, shortened=outcome.shortened)
        if writer is not None:
            writer.add(outcome.document, source.name, outcome.num_bytes)
        enough_tokens = (
            source.max_tokens is not None and counts.num_bytes >= source.max_tokens * config.bytes_per_token
        )
        if enough_tokens or counts.kept == source.max_documents:
            counts.budget_reached = True
            return


def _process_source(
    source: Source, max_chars: int, cache: SourceCache | None, workers: Workers, counts: SourceCounts
) -> Generator[list[Outcome], None, None]:
    """The outcomes of a source in batches: first those in the cache, then the others, which go into it."""
    num_cached = 0
    if cache is not None:
        counts.facts = cache.facts() or {}
        for outcomes in cache.read():
            num_cached += len(outcomes)
            yield outcomes
        if cache.is_complete():
            return
    opened = open_source(source, max_chars, skip=num_cached)
    counts.facts = opened.facts
    if cache is not None:
        cache.save_facts(opened.facts)
    for outcomes in workers.map(make_batches(opened.records)):
        if cache is not None:
            cache.write(outcomes)
        yield outcomes
    if cache is not None:
        cache.finish()


def _summarize(config: PrepareConfig, all_counts: list[SourceCounts]) -> Manifest:
    sources = [counts.to_json(config.bytes_per_token) for counts in all_counts]
    warnings = []
    for source, counts in zip(config.sources, all_counts, strict=True):
        has_budget = source.max_tokens is not None or source.max_documents is not None
        warnings += find_warnings(counts, has_budget=has_budget, bytes_per_token=config.bytes_per_token)
    for warning in warnings:
        print(f"lumi: warning: {warning}", file=sys.stderr)
    return {
        "documents": sum(source["kept"] for source in sources),
        "bytes": sum(source["bytes"] for source in sources),
        "estimated_tokens": sum(source["estimated_tokens"] for source in sources),
        "config": to_dict(config),
        "sources": sources,
        "warnings": warnings,
        "environment": {"python": ".".join(map(str, sys.version_info[:3])), **_versions(config)},
    }


def _versions(config: PrepareConfig) -> dict[str, str]:
    packages = ["ftfy", "rensa", "pyarrow", *(["py3langid"] if config.rules.filters.languages else [])]
    return {package: importlib.metadata.version(package) for package in packages}


def _source_key(source: Source, config: PrepareConfig) -> str:
    """All that decides the outcomes of a source; its budget and the threshold of near duplicates do not."""
    fingerprints = {key: value for key, value in to_dict(config.deduplication).items() if key != "threshold"}
    batches = [processing.BATCH_DOCUMENTS, processing.BATCH_CHARS]
    rules = [to_dict(config.cleaning), to_dict(config.rules.filters), fingerprints, batches]
    return cache_key([CACHE_FORMAT, identify(source), *rules, _versions(config)])


def _check_output(folder: Path, config: PrepareConfig, use_cache: bool) -> Manifest | None:
    """The manifest of the corpus that is there, or None.

    Raises UserError if this run must not or cannot replace it.
    """
    check_output(folder, renamed=False)
    if not folder.exists():
        return None
    manifest = read_manifest(folder)
    if manifest is None:
        foreign = sorted(path.name for path in folder.iterdir() if not OURS.fullmatch(path.name))
        if foreign:
            raise UserError(
                "--output-dir",
                "must be new, empty or a corpus folder",
                got=f"{folder} with {', '.join(foreign[:3])} in it",
            )
    elif manifest.get("config") != to_dict(config) and not use_cache:
        old = manifest.get("config", {})
        changed = sorted(key for key, value in to_dict(config).items() if old.get(key) != value)
        raise UserError(
            "--output-dir",
            "must not hold a corpus of another config",
            got=f"{folder} (made with other {', '.join(changed)})",
            remedy="choose another folder, or add --use-cache to replace it and reuse the unchanged sources",
        )
    return manifest


def _is_whole(folder: Path, manifest: Manifest) -> bool:
    try:
        CorpusReader(folder, manifest).verify()
    except UserError as error:
        print(f"lumi: {error}; it is made again", file=sys.stderr)
        return False
    return True


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """One run at a time in a folder; the kernel drops the lock of a process that was killed."""
    import fcntl  # not on Windows

    (folder / ".cache").mkdir(exist_ok=True)
    with open(folder / ".cache" / "lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                "--output-dir",
                "must be used by one run at a time",
                got=f"{folder}, where another run is at work",
            ) from error
        yield


@contextlib.contextmanager
def _interruptible(writes: bool) -> Iterator[None]:
    """SIGTERM ends the run as Ctrl-C does, through every `finally`; a second one ends it at once."""

    def terminate(signum: int, _frame: object) -> None:
        signal.signal(signum, signal.SIG_DFL)
        raise SystemExit(128 + signum)

    in_main_thread = threading.current_thread() is threading.main_thread()
    previous = signal.signal(signal.SIGTERM, terminate) if in_main_thread else None
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        kept = "finished batches are kept, run again with --use-cache to go on"
        print(f"lumi: interrupted; {kept if writes else 'nothing was written'}", file=sys.stderr)
        raise
    finally:
        if in_main_thread:
            signal.signal(signal.SIGTERM, previous)
