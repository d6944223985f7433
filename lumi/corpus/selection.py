"""Which documents a corpus keeps, decided in their order: duplicates, budgets, and what is counted."""

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial

from lumi.config import UserError, to_dict
from lumi.corpus.counts import SourceCounts
from lumi.corpus.documents import Document
from lumi.corpus.evaluation_sets import EvaluationSet
from lumi.corpus.folder import Manifest
from lumi.corpus.prepare_config import PrepareConfig
from lumi.corpus.processing import Outcome
from lumi.corpus.report import find_warnings
from lumi.corpus.review import Review
from lumi.corpus.scrubbing import DETAILS
from lumi.corpus.source_outcomes import package_versions
from lumi.corpus.sources import Source


def select(
    outcomes: Sequence[Outcome],
    duplicates: Iterable[str],
    source: Source,
    bytes_per_token: float,
    counts: SourceCounts,
    review: Review,
    read: Callable[[int], Document | None],
) -> Iterator[int]:
    """Count a batch, up to the document that reaches the budget; the places in it of those that are kept.

    Args:
        duplicates: for each outcome the reason of the `Deduplicator`; no more are taken than are needed.
        bytes_per_token: the estimate behind budgets.
        review: takes the documents that are counted.
        read: gives the document at a place of the batch, if it passed the filters; for few of them.
    """
    for place, (outcome, duplicate) in enumerate(zip(outcomes, duplicates, strict=True)):
        counts.note_unused(outcome.unused)
        reason = outcome.reason or duplicate
        review.add(source.name, reason, outcome.glimpse, outcome.detail, partial(read, place))
        if reason:
            counts.drop(reason, outcome.detail)
            continue
        counts.keep(
            outcome.num_bytes,
            shortened=outcome.shortened,
            license=outcome.attribution.license,
            replaced=dict(zip(DETAILS, outcome.replaced, strict=True)),
        )
        yield place
        enough_tokens = (
            source.max_tokens is not None and counts.num_bytes >= source.max_tokens * bytes_per_token
        )
        if enough_tokens or counts.kept == source.max_documents:
            counts.budget_reached = True
            return


def summarize(
    config: PrepareConfig, all_counts: Sequence[SourceCounts], sets: Sequence[EvaluationSet] = ()
) -> Manifest:
    """The manifest of a corpus, without its shards; `sets` are those of `read_evaluation_sets`."""
    sources = [counts.to_json(config.bytes_per_token) for counts in all_counts]
    warnings = []
    for source, counts in zip(config.sources, all_counts, strict=True):
        has_budget = source.max_tokens is not None or source.max_documents is not None
        warnings += find_warnings(counts, has_budget=has_budget, bytes_per_token=config.bytes_per_token)
    return {
        "documents": sum(source["kept"] for source in sources),
        "bytes": sum(source["bytes"] for source in sources),
        "estimated_tokens": sum(source["estimated_tokens"] for source in sources),
        "config": to_dict(config),
        "sources": sources,
        "evaluation_sets": [each.to_json() for each in sets],
        "warnings": warnings,
        "environment": {"python": ".".join(map(str, sys.version_info[:3])), **package_versions(config)},
    }


def check_not_empty(manifest: Manifest) -> None:
    """Raises UserError, with the warnings, if no document is kept."""
    if not manifest["documents"]:
        raise UserError(
            "sources",
            "must give at least one document that is kept",
            got=f"none: {'; '.join(manifest['warnings'])}",
            remedy="see what each filter drops with --analyze-only, and loosen it",
        )
