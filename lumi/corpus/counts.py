"""How many records of each source were kept, and how many dropped by reason, from the run to the manifest."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from lumi.chat.messages import NO_PLACE_FOR

NUM_EXAMPLES = 5
MOST_LICENSES = 100  # of a source; a field that holds no names of licences would have one for each document
OTHER_LICENSES = "(others)"
SHARES_TEXT_WITH = "shares_text_with_"  # such reasons end with the name of an evaluation set
# In the order in which a record meets them. Those of OPEN end with a name from the data or the config.
OPEN = (NO_PLACE_FOR, SHARES_TEXT_WITH)
REASONS = (
    "malformed_json",
    "malformed_csv",
    "invalid_utf8",
    "missing_text",
    "wrong_type",
    "no_score",
    "malformed_messages",
    "two_system_messages",
    "null_content",
    NO_PLACE_FOR,
    "malformed_tree",
    "unknown_role",
    "other_language",
    "deleted",
    "no_summary",
    "answer_in_train",
    "different_prompts",
    "equal_answers",
    "not_sampled",
    "low_score",
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
    SHARES_TEXT_WITH,
    "exact_duplicate",
    "normalized_duplicate",
    "near_duplicate",
)


def in_order(reasons: Iterable[str]) -> list[str]:
    """Reasons in the order of REASONS."""
    known = lambda reason: next(filter(reason.startswith, OPEN), reason)
    return sorted(reasons, key=lambda reason: (REASONS.index(known(reason)), reason))


@dataclass(kw_only=True)
class SourceCounts:
    """What became of the records of a source: read == kept + the sum of dropped.

    Args:
        name, origin: of the source.
        shortened: how many of the kept conversations lack messages.
        num_bytes: of UTF-8 text kept.
        licenses: documents kept of each licence, where the source names a field of it; "" of none.
        replaced: how many personal details of each kind became placeholders in what is kept.
        dropped: by reason, as in REASONS.
        unused_fields: the names of fields that hold something and that nobody reads.
        examples: the first few malformed records, each with its reason and place.
        budget_reached: whether the source was left because enough of it was kept.
        facts: what was found out when the source was opened.
    """

    name: str
    origin: str
    read: int = 0
    kept: int = 0
    shortened: int = 0
    num_bytes: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    licenses: Counter[str] = field(default_factory=Counter)
    replaced: Counter[str] = field(default_factory=Counter)
    unused_fields: list[str] = field(default_factory=list)
    examples: list[str] = field(default_factory=list)
    budget_reached: bool = False
    facts: dict[str, Any] = field(default_factory=dict)

    def keep(
        self,
        num_bytes: int,
        *,
        shortened: bool,
        license: str | None = None,
        replaced: Mapping[str, int] | None = None,
    ) -> None:
        """Count a record whose document is kept. Licences beyond MOST_LICENSES are counted together."""
        self.read += 1
        self.kept += 1
        self.num_bytes += num_bytes
        if shortened:
            self.shortened += 1
        self.replaced += Counter(replaced)
        if license is not None:
            known = license in self.licenses or len(self.licenses) < MOST_LICENSES
            self.licenses[license if known else OTHER_LICENSES] += 1

    def drop(self, reason: str, detail: str) -> None:
        """Count a record that is dropped; `detail` describes a malformed one."""
        self.read += 1
        self.dropped[reason] += 1
        if detail and len(self.examples) < NUM_EXAMPLES:
            self.examples.append(f"{reason}: {detail}")

    def note_unused(self, names: Iterable[str]) -> None:
        """Remember fields of a record that nobody reads."""
        self.unused_fields += [name for name in names if name not in self.unused_fields]

    def estimate_tokens(self, bytes_per_token: float) -> int:
        """How many tokens are kept, by the estimate of the config."""
        return round(self.num_bytes / bytes_per_token)

    def to_json(self, bytes_per_token: float) -> dict[str, Any]:
        """The entry of the manifest."""
        return {
            "name": self.name,
            "origin": self.origin,
            "read": self.read,
            "kept": self.kept,
            "shortened": self.shortened,
            "dropped": {reason: self.dropped[reason] for reason in in_order(self.dropped)},
            "licenses": dict(sorted(self.licenses.items(), key=lambda item: (-item[1], item[0]))),
            "replaced": dict(self.replaced),
            "bytes": self.num_bytes,
            "estimated_tokens": self.estimate_tokens(bytes_per_token),
            "budget_reached": self.budget_reached,
            "unused_fields": self.unused_fields,
            "malformed_examples": self.examples,
            **self.facts,
        }


SAME_IN_MANIFEST = ("name", "origin", "read", "kept", "shortened", "budget_reached", "unused_fields")


def from_manifest(manifest: dict[str, Any]) -> list[SourceCounts]:
    """The counts of every source of a corpus, from the entries that `to_json` made."""
    return [_from_json(dict(entry)) for entry in manifest["sources"]]


def _from_json(entry: dict[str, Any]) -> SourceCounts:
    del entry["estimated_tokens"]  # it follows from the bytes
    return SourceCounts(
        num_bytes=entry.pop("bytes"),
        dropped=Counter(entry.pop("dropped")),
        replaced=Counter(entry.pop("replaced", {})),
        licenses=Counter(entry.pop("licenses", {})),
        examples=entry.pop("malformed_examples"),
        **{key: entry.pop(key) for key in SAME_IN_MANIFEST},
        facts=entry,
    )
