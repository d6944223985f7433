"""What a run of `prepare` says about its work: counts per source, the summary table and the data card."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

NUM_EXAMPLES = 5
# In the order in which a record meets them.
REASONS = (
    "malformed_json",
    "invalid_utf8",
    "missing_text",
    "wrong_type",
    "malformed_messages",
    "malformed_tree",
    "unknown_role",
    "other_language",
    "deleted",
    "no_summary",
    "answer_in_train",
    "empty",
    "no_answer",
    "system_not_first",
    "roles_do_not_alternate",
    "empty_turn",
    "too_many_messages",
    "short_answer",
    "too_short",
    "too_long",
    "blocked_phrase",
    "symbol_to_word_ratio",
    "duplicate_lines",
    "duplicate_line_chars",
    "top_ngram",
    "duplicate_ngrams",
    "language",
    "exact_duplicate",
    "near_duplicate",
)


@dataclass
class SourceCounts:
    """What became of the records of a source: read == kept + the sum of dropped; `shortened` of the kept ones lack messages."""

    name: str
    origin: str
    read: int = 0
    kept: int = 0
    shortened: int = 0
    num_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    examples: list[str] = field(default_factory=list)
    budget_reached: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def drop(self, reason: str, detail: str) -> None:
        """Count a record that is dropped; the first few that were malformed are kept as examples."""
        self.dropped[reason] += 1
        if detail and len(self.examples) < NUM_EXAMPLES:
            self.examples.append(f"{reason}: {detail}")

    def to_json(self, bytes_per_token: float) -> dict[str, Any]:
        """The entry of the manifest."""
        return {
            "name": self.name,
            "origin": self.origin,
            "read": self.read,
            "kept": self.kept,
            "shortened": self.shortened,
            "dropped": {reason: self.dropped[reason] for reason in sorted(self.dropped, key=REASONS.index)},
            "bytes": self.num_bytes,
            "estimated_tokens": round(self.num_bytes / bytes_per_token),
            "budget_reached": self.budget_reached,
            "malformed_examples": self.examples,
            **self.facts,
        }


def noun(manifest: dict[str, Any]) -> str:
    """What the corpus holds: "documents" or "conversations"."""
    return "conversations" if manifest["config"]["conversation_filters"] else "documents"


def summary_table(manifest: dict[str, Any]) -> str:
    """Kept and dropped by reason, a column per source and one for all."""
    sources = manifest["sources"]
    total: dict[str, Any] = {"name": "total", "dropped": Counter()}
    for key in ("read", "kept", "shortened", "bytes", "estimated_tokens"):
        total[key] = sum(source[key] for source in sources)
    for source in sources:
        total["dropped"].update(source["dropped"])
    columns = [*sources, total] if len(sources) > 1 else list(sources)
    rows = [["", *(column["name"] for column in columns)]]
    rows += [
        [label, *(f"{column[key]:,}" for column in columns)]
        for label, key in ((f"{noun(manifest)} read", "read"), ("kept", "kept"))
    ]
    if total["shortened"]:
        rows.append(["kept, but shortened", *(f"{column['shortened']:,}" for column in columns)])
    for reason in (reason for reason in REASONS if total["dropped"][reason]):
        rows.append([f"dropped: {reason}", *(f"{column['dropped'].get(reason, 0):,}" for column in columns)])
    rows.append(["megabytes kept", *(f"{column['bytes'] / 1e6:,.2f}" for column in columns)])
    rows.append(["estimated tokens", *(f"{column['estimated_tokens']:,}" for column in columns)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows
    )


def find_warnings(sources: Sequence[dict[str, Any]], budgets: Sequence[bool]) -> list[str]:
    """What a user should look at: sources that give nothing, or less than their budget."""
    warnings = []
    for source, has_budget in zip(sources, budgets, strict=True):
        if not source["kept"]:
            reasons = (
                ", ".join(f"{count} {reason}" for reason, count in source["dropped"].items()) or "it is empty"
            )
            example = "".join(
                f"; the first malformed one: {text}" for text in source["malformed_examples"][:1]
            )
            warnings.append(
                f"source {source['name']!r}: no document is kept of {source['read']} read ({reasons}){example}"
            )
        elif has_budget and not source["budget_reached"]:
            warnings.append(
                f"source {source['name']!r} ended before its budget: {source['estimated_tokens']:,} estimated tokens"
            )
    return warnings


def data_card(manifest: dict[str, Any]) -> str:
    """The manifest for people, as Markdown."""
    lines = [
        "# Data card",
        "",
        f"{manifest['documents']:,} {noun(manifest)}, {manifest['bytes'] / 1e6:,.2f} MB of UTF-8 text,"
        f" about {manifest['estimated_tokens']:,} tokens ({manifest['config']['bytes_per_token']} bytes per token), made by `lumi prepare`."
        " `manifest.json` holds the same for programs.",
        "",
        "## Sources",
        "",
        f"| source | from | {noun(manifest)} | MB | tokens (estimated) |",
        "|---|---|---:|---:|---:|",
    ]
    for source in manifest["sources"]:
        megabytes = f"{source['bytes'] / 1e6:,.2f}"
        lines.append(
            f"| {source['name']} | {source['origin']} | {source['kept']:,} | {megabytes} | {source['estimated_tokens']:,} |"
        )
    lines += ["", "## Kept and dropped", "", "```", summary_table(manifest), "```", ""]
    lines += _card_notes(manifest)
    lines += ["## How it was made", ""]
    for part in ("cleaning", "filters", "conversation_filters", "deduplication"):
        if manifest["config"][part] is None:
            continue
        lines.append(
            f"- {part}: " + ", ".join(f"`{key}` {value}" for key, value in manifest["config"][part].items())
        )
    lines.append(
        "- made with " + ", ".join(f"{name} {version}" for name, version in manifest["environment"].items())
    )
    lines += ["", "The texts stay under the licences of their sources.", ""]
    return "\n".join(lines)


def _card_notes(manifest: dict[str, Any]) -> list[str]:
    lines = [f"- {warning}" for warning in manifest["warnings"]]
    for source in manifest["sources"]:
        if source["shortened"]:
            left_out = (
                "without what the user said last, which has no answer, or without a blank system message"
            )
            lines.append(
                f"- {source['name']}: {source['shortened']:,} of {source['kept']:,} conversations are kept {left_out}"
            )
        lines += [f"- malformed in {source['name']}: {example}" for example in source["malformed_examples"]]
        if "sha256" in source:
            lines.append(f"- {source['name']}: SHA-256 of its documents {source['sha256']}")
    return ["## Notes", "", *lines, ""] if lines else []
