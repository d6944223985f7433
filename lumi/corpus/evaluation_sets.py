"""What a corpus is decontaminated against: the texts of evaluation sets, and what identifies the sets."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lumi.config import UserError
from lumi.corpus.raw_records import Fields, read_records
from lumi.corpus.sources import HubDataset, Location, describe
from lumi.corpus.words import plain_words
from lumi.host.file_patterns import matching_files
from lumi.host.storage import sha256_file


@dataclass(frozen=True, kw_only=True)
class EvaluationSetConfig:
    """An evaluation set. Each string in its records is a text, also one in a list or an object."""

    # The name in reports; documents are counted under it.
    name: str
    source: Location
    # The fields of a record whose strings count; null: all.
    fields: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError('name must be a name for reports, got ""')
        if self.fields == ():
            raise ValueError("fields must hold at least one name, or be null for all, got []")


@dataclass(frozen=True, kw_only=True)
class DecontaminationConfig:
    """Which documents are dropped because they share text with an evaluation set.

    A document is dropped if it holds `ngram` successive words of a text, or all words of a shorter text of at
    least `min_words`. Case, punctuation and line ends make no difference. Both numbers are those of GPT-3
    (Brown et al. 2020, arXiv:2005.14165, appendix C).
    """

    # The evaluation sets; a document that shares text with several is counted under the first of them.
    against: tuple[EvaluationSetConfig, ...]
    # As many successive words of a text must occur in a document.
    ngram: int = 13
    # A text with fewer words than `ngram` counts as a whole; one with fewer than these does not count.
    min_words: int = 8

    def __post_init__(self) -> None:
        names = [each.name for each in self.against]
        if not names:
            raise ValueError("against must hold at least one evaluation set, got none")
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise ValueError(f"against must have different names, got {', '.join(twice)} more than once")
        if not 1 <= self.min_words <= self.ngram:
            raise ValueError(f"min_words must be between 1 and ngram = {self.ngram}, got {self.min_words}")


class EvaluationSet(NamedTuple):
    """An evaluation set that was read.

    Attributes:
        origin: where it lies, in words.
        content: what identifies its data, as `content_of` has it.
        records: how many it has.
        texts: those with enough words, as their `plain_words` with spaces between; none repeats.
    """

    name: str
    origin: str
    content: list[str]
    records: int
    texts: list[str]

    @property
    def sha256(self) -> str:
        """Of the texts."""
        return hashlib.sha256("\n".join(self.texts).encode()).hexdigest()

    def to_json(self) -> dict[str, Any]:
        """The entry of the manifest."""
        sizes = {"records": self.records, "texts": len(self.texts)}
        return {
            "name": self.name,
            "origin": self.origin,
            "content": self.content,
            **sizes,
            "sha256": self.sha256,
        }


def content_of(location: Location) -> list[str]:
    """What identifies the data at a location: the SHA-256 of each file, wherever it lies; the hub's names.

    Raises:
        UserError: a path matches no file.
    """
    if isinstance(location, HubDataset):
        return [describe(location)]
    return [sha256_file(path) for path in matching_files(location.paths)]


def names_against(manifest: Mapping[str, Any]) -> list[str]:
    """The names of the evaluation sets that a corpus was decontaminated against, from its manifest."""
    return [each["name"] for each in manifest.get("evaluation_sets", ())]  # older manifests have none


def is_against(manifest: Mapping[str, Any], content: Sequence[str]) -> bool:
    """Whether a corpus was decontaminated against all of a `content_of`, under whatever name."""
    known = {part for each in manifest.get("evaluation_sets", ()) for part in each["content"]}
    return known.issuperset(content)


def read_evaluation_sets(config: DecontaminationConfig | None) -> list[EvaluationSet]:
    """The sets of a config, in its order; none without a config.

    Raises:
        UserError: before any other work: a set cannot be read, lacks a field, or has no text that is long
            enough to be found.
    """
    if config is None:
        return []
    found = []
    for each in config.against:
        try:
            found.append(_read(each, config.min_words))
        except UserError as error:
            raise error.within(f"decontamination against {each.name!r}") from error
    return found


def _read(config: EvaluationSetConfig, min_words: int) -> EvaluationSet:
    records = read_records(config.source)
    words = (plain_words(text) for record in records for text in _strings(_chosen(record, config.fields)))
    texts = list(dict.fromkeys(" ".join(each) for each in words if len(each) >= min_words))
    if not texts:
        remedy = "lower decontamination.min_words, or leave the set out"
        raise UserError("source", f"must hold a text of {min_words} words", got="none", remedy=remedy)
    content = content_of(config.source)
    return EvaluationSet(config.name, describe(config.source), content, len(records), texts)


def _chosen(record: Fields, names: tuple[str, ...] | None) -> Any:
    if names is None:
        return record
    if missing := [name for name in names if name not in record]:
        known = ", ".join(record)
        raise UserError("fields", f"must be among those of each record ({known})", got=", ".join(missing))
    return [record[name] for name in names]


def _strings(value: Any) -> Iterator[str]:
    """All strings in a JSON value, but the names of fields."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)
