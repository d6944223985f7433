"""The report of a corpus: one HTML page of what was dropped. The same corpus gives the same bytes."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from lumi.corpus.counts import from_manifest, in_order
from lumi.corpus.report import noun, summary_rows, unused_fields
from lumi.corpus.review import EXCERPT_CHARS, NUM_EXAMPLES, Review
from lumi.host.page import template

GENERATOR = "lumi prepare"


def report_page(manifest: dict[str, Any], review: Review) -> str:
    """The page of a corpus, of which `review` has seen all documents."""
    header, rows = summary_rows(manifest)
    dropped: Counter[str] = Counter()
    for source in from_manifest(manifest):
        dropped += source.dropped
    examples = [
        (f"dropped: {reason}", dropped[reason], review.examples(reason)) for reason in in_order(dropped)
    ]
    return template(Path(__file__).with_name("report.html.jinja")).render(
        generator=GENERATOR,
        title=f"Corpus report: {manifest['documents']:,} {noun(manifest)}",
        noun=noun(manifest),
        warnings=manifest["warnings"] + unused_fields(manifest),
        header=header,
        rows=[(label, figures) for label, *figures in rows],
        lengths=review.lengths,
        languages=review.languages,
        examples=[*examples, ("kept", manifest["documents"], review.examples(""))],
        num_examples=NUM_EXAMPLES,
        excerpt_chars=EXCERPT_CHARS,
        config=json.dumps(manifest["config"], indent=2, ensure_ascii=False),
    )
