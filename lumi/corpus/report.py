"""What a run of `prepare` prints and writes for people: the summary table, the warnings and the data card."""

import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lumi.corpus.counts import SHARES_TEXT_WITH, SourceCounts, from_manifest, in_order
from lumi.corpus.scrubbing import DETAILS

CARD, PAGE = "DATA_CARD.md", "DATA_REPORT.html"  # in a corpus folder
NAMES_SHOWN = 20  # `manifest.json` has all of them


def noun(manifest: dict[str, Any]) -> str:
    """What the corpus holds: "documents", "conversations" or "pairs"."""
    formats = [source.get("conversation") for source in manifest["config"]["sources"]]
    if any(each and each["kind"] == "preference" for each in formats):
        return "pairs"
    return "conversations" if manifest["config"]["conversation_filters"] else "documents"


def print_warnings(manifest: dict[str, Any]) -> None:
    """The warnings, on stderr."""
    for warning in manifest["warnings"]:
        print(f"lumi: warning: {warning}", file=sys.stderr)


def print_made(folder: Path, manifest: dict[str, Any]) -> None:
    """What a corpus that was just made holds."""
    shards = "1 shard" if len(manifest["shards"]) == 1 else f"{len(manifest['shards'])} shards"
    made = f"{manifest['documents']:,} {noun(manifest)} in {shards}"
    print_report(manifest, f"{made}: {folder} ({folder}/.cache may be deleted)")
    print(f"what was dropped, with examples: {folder}/{PAGE}")


def print_up_to_date(folder: Path, manifest: dict[str, Any]) -> None:
    """What a corpus holds that need not be made again."""
    print_report(manifest, f"{folder} is up to date: {manifest['documents']:,} {noun(manifest)}")


def print_report(manifest: dict[str, Any], last_line: str) -> None:
    """The table, the unused fields, and a line about what was done."""
    print("\n".join([summary_table(manifest), *unused_fields(manifest), last_line]))


def summary_rows(manifest: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Kept and dropped by reason: the header, with a column per source and one for all, and the rows."""
    sources = from_manifest(manifest)
    header = ["", *(source.name for source in sources)]
    rows = [
        _row(f"{noun(manifest)} read", (source.read for source in sources)),
        _row("kept", (source.kept for source in sources)),
    ]
    if any(source.shortened for source in sources):
        rows.append(_row("kept, but shortened", (source.shortened for source in sources)))
    for reason in in_order({reason for source in sources for reason in source.dropped}):
        rows.append(_row(f"dropped: {reason}", (source.dropped[reason] for source in sources)))
    for detail in DETAILS:
        if any(source.replaced[detail] for source in sources):
            rows.append(_row(f"replaced: {detail}", (source.replaced[detail] for source in sources)))
    rows.append(_row("megabytes kept", (source.num_bytes for source in sources), _megabytes))
    rows.append(_row("estimated tokens", _estimates(manifest, sources)))
    if len(sources) > 1:
        header.append("total")
    return header, rows


def summary_table(manifest: dict[str, Any]) -> str:
    """The rows as text, in columns."""
    header, rows = summary_rows(manifest)
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    return "\n".join(
        "  ".join([label.ljust(widths[0]), *map(str.rjust, figures, widths[1:])]).rstrip()
        for label, *figures in [header, *rows]
    )


def _row(label: str, figures: Iterable[int], show: Callable[[int], str] = "{:,}".format) -> list[str]:
    """One line of the table; of several figures the last column is the sum."""
    figures = list(figures)
    if len(figures) > 1:
        figures.append(sum(figures))
    return [label, *map(show, figures)]


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.2f}"


def _estimates(manifest: dict[str, Any], sources: Sequence[SourceCounts]) -> list[int]:
    return [source.estimate_tokens(manifest["config"]["bytes_per_token"]) for source in sources]


def find_warnings(source: SourceCounts, *, has_budget: bool, bytes_per_token: float) -> list[str]:
    """What a user should look at: a source that gives nothing, or less than its budget."""
    if not source.kept:
        reasons = ", ".join(f"{source.dropped[reason]} {reason}" for reason in in_order(source.dropped))
        example = f"; the first of them: {source.examples[0]}" if source.examples else ""
        return [
            f"source {source.name!r}: no document is kept of {source.read} read"
            f" ({reasons or 'it is empty'}){example}"
        ]
    if has_budget and not source.budget_reached:
        tokens = source.estimate_tokens(bytes_per_token)
        return [f"source {source.name!r} ended before its budget: {tokens:,} estimated tokens"]
    return []


def unused_fields(manifest: dict[str, Any]) -> list[str]:
    """A line for each source that has fields which nobody reads."""
    lines = []
    for source in from_manifest(manifest):
        if names := source.unused_fields:
            more = f" and {len(names) - NAMES_SHOWN:,} more" if len(names) > NAMES_SHOWN else ""
            lines.append(f"{source.name}: fields that are not used: {', '.join(names[:NAMES_SHOWN])}{more}")
    return lines


def data_card(manifest: dict[str, Any]) -> str:
    """The manifest for people, as Markdown."""
    config, environment = manifest["config"], manifest["environment"]
    lines = [
        "# Data card",
        "",
        f"{manifest['documents']:,} {noun(manifest)}, {_megabytes(manifest['bytes'])} MB of UTF-8 text,"
        f" about {manifest['estimated_tokens']:,} tokens ({config['bytes_per_token']} bytes per token),"
        " made by `lumi prepare`. `manifest.json` holds the same for programs.",
        "",
        "## Sources",
        "",
        f"| source | from | {noun(manifest)} | MB | tokens (estimated) |",
        "|---|---|---:|---:|---:|",
    ]
    sources = from_manifest(manifest)
    for source, tokens in zip(sources, _estimates(manifest, sources), strict=True):
        figures = f"{source.kept:,} | {_megabytes(source.num_bytes)} | {tokens:,}"
        lines.append(f"| {source.name} | {source.origin} | {figures} |")
    lines += ["", "## Kept and dropped", "", "```", summary_table(manifest), "```", ""]
    if any(source.licenses for source in sources):
        lines += ["## Licences", "", f"| source | licence | {noun(manifest)} |", "|---|---|---:|"]
        lines += [
            f"| {source.name} | {_cell(license) or 'not given'} | {count:,} |"
            for source in sources
            for license, count in source.licenses.items()
        ] + [""]
    notes = [f"- {line}" for line in (*manifest["warnings"], *unused_fields(manifest))] + _notes(sources)
    if notes:
        lines += ["## Notes", "", *notes, ""]
    lines += [*_decontamination(manifest, sources), "## How it was made", ""]
    for part in ("cleaning", "filters", "conversation_filters", "deduplication"):
        if config[part] is not None:
            lines.append(f"- {part}: " + ", ".join(f"`{key}` {value}" for key, value in config[part].items()))
    lines.append("- made with " + ", ".join(f"{name} {version}" for name, version in environment.items()))
    lines += ["", "The texts stay under the licences of their sources.", ""]
    return "\n".join(lines)


def _decontamination(manifest: dict[str, Any], sources: Sequence[SourceCounts]) -> list[str]:
    if not manifest["evaluation_sets"]:
        return []
    config, what = manifest["config"]["decontamination"], noun(manifest)
    rule = (
        f"{what.capitalize()} were dropped that share {config['ngram']} successive words with a text of these"
        f" sets, or all words of a shorter text of at least {config['min_words']} words, whatever their case"
        " and punctuation. Those that share text with several count under the first."
    )
    lines = ["## Decontamination", "", rule, ""]
    lines += [f"| evaluation set | from | records | {what} dropped |", "|---|---|---:|---:|"]
    for each in manifest["evaluation_sets"]:
        dropped = sum(source.dropped[SHARES_TEXT_WITH + each["name"]] for source in sources)
        lines.append(f"| {each['name']} | {each['origin']} | {each['records']:,} | {dropped:,} |")
    return [*lines, ""]


def _cell(text: str) -> str:
    """A text in one cell of a table of Markdown."""
    return " ".join(text.replace("|", "\\|").replace("<", "\\<").split())


def _notes(sources: Sequence[SourceCounts]) -> list[str]:
    lines = []
    for source in sources:
        if source.shortened:
            left_out = (
                "without what the user said last, which has no answer, or without a blank system message"
            )
            lines.append(
                f"- {source.name}: {source.shortened:,} of {source.kept:,} conversations are kept {left_out}"
            )
        lines += [f"- dropped of {source.name}: {example}" for example in source.examples]
        if "sha256" in source.facts:
            lines.append(f"- {source.name}: SHA-256 of its documents {source.facts['sha256']}")
    return lines
