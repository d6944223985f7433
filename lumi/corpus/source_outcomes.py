"""The outcomes of one source, from its cache or made anew, and the key that says when a cache may be used."""

import importlib.metadata
from collections.abc import Generator, Sequence
from pathlib import Path

from lumi.config import to_dict
from lumi.corpus import processing
from lumi.corpus.cache import SourceCache, cache_key
from lumi.corpus.counts import SourceCounts
from lumi.corpus.documents import Record
from lumi.corpus.evaluation_sets import EvaluationSet
from lumi.corpus.filters import classifier
from lumi.corpus.overlaps import Overlaps
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.processing import Outcome, RecordRules, make_batches
from lumi.corpus.reading import open_source
from lumi.corpus.sources import Source, identify
from lumi.host.workers import Workers

CACHE_FORMAT = 6  # raise it when cleaning, filters or fingerprints change their results


def open_cache(folder: Path, source: Source, key: str, *, writable: bool) -> SourceCache:
    """The cache of a source in a corpus folder; `key` is that of `source_key`."""
    return SourceCache(folder / ".cache" / f"{source.name}-{key}", kind=source.holds, writable=writable)


def rules_of(config: PrepareConfig, sets: Sequence[EvaluationSet]) -> RecordRules:
    """The rules for a single record; `sets` are those of `read_evaluation_sets`."""
    if config.decontamination is None:
        return config.rules
    return config.rules._replace(overlaps=Overlaps(sets, config.decontamination.ngram))


def source_keys(config: PrepareConfig, sets: Sequence[EvaluationSet] = ()) -> dict[str, str]:
    """The key of each source, by name; `sets` are those of `read_evaluation_sets`.

    Raises:
        UserError: before any work: a file of a source cannot be read, a language is unknown.
    """
    if config.rules.filters.languages is not None:
        classifier(config.rules.filters.languages)
    return {source.name: source_key(source, config, sets) for source in config.sources}


def source_key(source: Source, config: PrepareConfig, sets: Sequence[EvaluationSet] = ()) -> str:
    """All that decides the outcomes of a source; its budget and the threshold of near duplicates do not."""
    assert bool(sets) == (config.decontamination is not None)
    fingerprints = {key: value for key, value in to_dict(config.deduplication).items() if key != "threshold"}
    batches = [processing.BATCH_DOCUMENTS, processing.BATCH_CHARS]
    rules = [to_dict(config.cleaning), to_dict(config.rules.filters), fingerprints, batches]
    if config.decontamination is not None:
        rules.append([config.decontamination.ngram, *(each.to_json() for each in sets)])
    return cache_key([CACHE_FORMAT, identify(source), *rules, package_versions(config)])


def inputs_key(config: PrepareConfig, keys: dict[str, str]) -> str:
    """Identifies config and inputs of a corpus; `keys` are those of `source_keys`."""
    return cache_key([to_dict(config), keys])


def package_versions(config: PrepareConfig) -> dict[str, str]:
    """The versions of the packages that decide what a corpus holds."""
    packages = ["ftfy", "rensa", "pyarrow", *(["py3langid"] if config.rules.filters.languages else [])]
    return {package: importlib.metadata.version(package) for package in packages}


def process_source(
    source: Source,
    max_chars: int,
    cache: SourceCache | None,
    workers: Workers[list[Record], list[Outcome]],
    counts: SourceCounts,
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
