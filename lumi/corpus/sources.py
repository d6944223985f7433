"""Where data comes from: the config of each kind of source, and what identifies its content.

A location says where data lies: in files, or in a dataset on the hub. `lumi evaluate` reads locations. A
source of the stage `prepare` is a location, or the documentation inside this Python, with a name and a
budget.
"""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from lumi.config import UserError, to_dict
from lumi.corpus.compression import find_compression
from lumi.corpus.conversations import (
    AlpacaFormat,
    DollyFormat,
    MessagesFormat,
    PromptResponseFormat,
    ShareGptFormat,
    check_names,
)
from lumi.corpus.documents import Kind
from lumi.corpus.oasst import OasstFormat, OasstMessagesFormat
from lumi.corpus.preferences import PreferenceFormat
from lumi.corpus.python_docs import LAYOUT_VERSION, installed_versions
from lumi.corpus.python_questions import PHRASING_VERSION
from lumi.host.file_patterns import check_patterns, matching_files

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


ConversationFormat = (
    AlpacaFormat
    | DollyFormat
    | MessagesFormat
    | ShareGptFormat
    | PromptResponseFormat
    | OasstFormat
    | OasstMessagesFormat
    | PreferenceFormat
)


@dataclass(frozen=True, kw_only=True)
class Checked:
    """The root of locations and sources: every class checks its own fields and calls `super()`."""

    def __post_init__(self) -> None:
        """Raises ValueError if a field has an impossible value."""


@dataclass(frozen=True, kw_only=True)
class HubDataset(Checked):
    """A dataset on the Hugging Face hub. It is streamed: only the rows that are read are downloaded."""

    kind: Literal["hub"] = "hub"
    # The dataset's name on the hub, for example `wikimedia/wikipedia`.
    dataset: str
    # The dataset's configuration; null: its only one.
    subset: str | None = None
    # The dataset's split.
    split: str = "validation"
    # A commit or tag of the dataset; null: the newest.
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("dataset", "split"):
            if getattr(self, key) == "":
                raise ValueError(f'{key} must be a name, got ""')


@dataclass(frozen=True, kw_only=True)
class Files(Checked):
    """Local files: `paths` holds paths, glob patterns and folders. gzip, bzip2, xz and zstd are unpacked."""

    kind: str
    # Files, patterns such as `data/*.jsonl`, or folders, which mean all files in them that are not hidden.
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.paths)


@dataclass(frozen=True, kw_only=True)
class JsonlFiles(Files):
    """Files with one JSON object per line."""

    kind: Literal["jsonl"] = "jsonl"


@dataclass(frozen=True, kw_only=True)
class JsonFiles(Files):
    """Files that hold one JSON array of objects; each is held in memory while it is read."""

    kind: Literal["json"] = "json"


@dataclass(frozen=True, kw_only=True)
class TextFiles(Files):
    """UTF-8 text files."""

    kind: Literal["text"] = "text"


@dataclass(frozen=True, kw_only=True)
class NamedSource(Checked):
    """What every source of `prepare` has: a name in reports, and a budget of what is kept of it."""

    # The name in reports: letters, digits, `.`, `_` and `-`.
    name: str
    # Stop when this many tokens are kept, by estimate; null: read all.
    max_tokens: int | None = None
    # Stop when this many documents are kept; null: read all.
    max_documents: int | None = None
    # The share of the documents that a hash of each one picks, in (0, 1]; null: all.
    sample_fraction: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {self.name!r}")
        for key in ("max_tokens", "max_documents"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, or null for all, got {value}")
        if self.sample_fraction is not None and not 0 < self.sample_fraction <= 1:
            raise ValueError(
                f"sample_fraction must be within (0, 1], or null for all, got {self.sample_fraction}"
            )

    @property
    def holds(self) -> Kind:
        """What its documents are."""
        return "texts"


@dataclass(frozen=True, kw_only=True)
class RecordSource(NamedSource):
    """A source of records with fields: a text in one of them, or a conversation or a pair in a format."""

    # The field of a record that holds its text.
    text_field: str = "text"
    # How a record is read as a conversation; null: it is a text.
    conversation: ConversationFormat | None = None
    # The field of a record with its score of quality, a number; null: there is none.
    score_field: str | None = None
    # A record with a lower score is dropped; null: `score_field` is null too.
    min_score: float | None = None
    # The field of a record with its licence, kept in the column `license` of the corpus; null: none is kept.
    license_field: str | None = None
    # The field of a record with its address, kept in the column `url` of the corpus; null: none is kept.
    url_field: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_names(score_field=self.score_field, license_field=self.license_field, url_field=self.url_field)
        if (self.score_field is None) != (self.min_score is None):
            given = "score_field" if self.min_score is None else "min_score"
            raise ValueError(f"score_field and min_score must be given together, got {given} alone")
        if isinstance(self.conversation, OasstMessagesFormat) and self.more_fields:
            names = ", ".join(self.more_fields)
            raise ValueError(
                f"score_field, license_field and url_field must be null with oasst_messages, whose rows are"
                f" parts of a tree, got {names}"
            )
        if self.text_field == "":
            raise ValueError('text_field must be a name, got ""')
        if self.conversation is not None and self.text_field != "text":
            raise ValueError(
                f"text_field must be left out where conversation is given, got {self.text_field!r}"
            )

    @property
    def more_fields(self) -> tuple[str, ...]:
        """The fields that are read beside those of the text or the conversation."""
        names = (self.score_field, self.license_field, self.url_field)
        return tuple(name for name in names if name is not None)

    @property
    def holds(self) -> Kind:
        if isinstance(self.conversation, PreferenceFormat):
            return "pairs"
        return "texts" if self.conversation is None else "conversations"


@dataclass(frozen=True, kw_only=True)
class HubSource(HubDataset, RecordSource):
    """A dataset on the hub, read until the budget is reached; "oasst_messages" needs all of its rows."""

    # The dataset's split.
    split: str = "train"


@dataclass(frozen=True, kw_only=True)
class JsonlSource(JsonlFiles, RecordSource):
    """Files with one JSON object per line."""


@dataclass(frozen=True, kw_only=True)
class JsonSource(JsonFiles, RecordSource):
    """Files that hold one JSON array of objects."""


@dataclass(frozen=True, kw_only=True)
class ParquetSource(Files, RecordSource):
    """Parquet files with a column of text, or with the columns of a conversation."""

    kind: Literal["parquet"] = "parquet"


@dataclass(frozen=True, kw_only=True)
class CsvSource(Files, RecordSource):
    """CSV files with a first line that names the columns; all values are texts."""

    kind: Literal["csv"] = "csv"
    # What stands between two fields: one character, for example a tab.
    delimiter: str = ","

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.delimiter) != 1 or self.delimiter in '"\r\n':
            raise ValueError(
                f"delimiter must be one character, no quote and no line end, got {self.delimiter!r}"
            )


@dataclass(frozen=True, kw_only=True)
class TextSource(TextFiles, NamedSource):
    """UTF-8 text files: a document per file, or the pieces between `separator` ("\\n\\n": blank lines)."""

    # What stands between two documents of a file; null: a file is one document.
    separator: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.separator == "":
            raise ValueError(
                'separator must be null (one document per file) or at least one character, got ""'
            )


@dataclass(frozen=True, kw_only=True)
class PythonDocsSource(NamedSource):
    """The documentation inside this Python.

    `packages`: "topics" (the language reference), "stdlib", and names of installed packages.
    """

    kind: Literal["python_docs"] = "python_docs"
    packages: tuple[str, ...] = ("topics", "stdlib", "numpy", "torch")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packages(self.packages)


@dataclass(frozen=True, kw_only=True)
class PythonQuestionsSource(NamedSource):
    """Questions about the modules, classes and functions of packages, with answers from their documentation.

    `packages`: "stdlib" and names of installed packages. `modules`: a hash of its name puts each module on
    one side, `held_out_fraction` of them on "held_out", the others on "train", so that two corpora share no
    module. `max_answer_chars`: an answer ends with the last sentence within this limit.
    """

    kind: Literal["python_questions"] = "python_questions"
    packages: tuple[str, ...] = ("stdlib",)
    modules: Literal["all", "train", "held_out"] = "all"
    # The share of the modules on the held-out side, between 0 and 1.
    held_out_fraction: float = 0.05
    max_answer_chars: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packages(self.packages)
        if "topics" in self.packages:
            raise ValueError(
                "packages must be stdlib or names of packages, got topics, which gives no questions"
            )
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be within 0 and 1, got {self.held_out_fraction}")
        if self.max_answer_chars < 20:
            raise ValueError(f"max_answer_chars must be at least 20, got {self.max_answer_chars}")

    @property
    def holds(self) -> Kind:
        return "conversations"


Location = HubDataset | JsonlFiles | JsonFiles | TextFiles
Source = (
    HubSource
    | JsonlSource
    | JsonSource
    | ParquetSource
    | CsvSource
    | TextSource
    | PythonDocsSource
    | PythonQuestionsSource
)


def identify(source: Source) -> dict[str, Any]:
    """What decides which documents a source gives: its config without name and budget, files, versions.

    Raises:
        UserError: a path matches no file, or one that is compressed in a way that nobody reads; a package of
            `python_docs` or `python_questions` is not installed.
    """
    config = {
        key: value
        for key, value in to_dict(source).items()
        if key not in ("name", "max_tokens", "max_documents")
    }
    if isinstance(source, PythonDocsSource):
        return config | {"versions": installed_versions(source.packages), "layout": LAYOUT_VERSION}
    if isinstance(source, PythonQuestionsSource):
        return config | {"versions": installed_versions(source.packages), "phrasing": PHRASING_VERSION}
    if isinstance(source, HubSource):
        return config
    try:
        paths = matching_files(source.paths)
        for path in paths:  # here, before the work on any file
            find_compression(path)
        stats = [(path, os.stat(path)) for path in paths]
    except UserError as error:
        raise error.within(f"source {source.name!r}") from error
    except OSError as error:
        got = error.strerror or str(error)
        raise UserError(f"source {source.name!r}: {error.filename}", "must be readable", got=got) from error
    return config | {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}


def describe(source: Source | Location) -> str:
    """One phrase for messages and reports: kind and address."""
    if isinstance(source, HubDataset):
        parts = [source.dataset, source.subset, source.split, source.revision]
        return "hub: " + " / ".join(part for part in parts if part)
    if isinstance(source, PythonDocsSource):
        return "python_docs: " + ", ".join(source.packages)
    if isinstance(source, PythonQuestionsSource):
        return f"python_questions: {', '.join(source.packages)} ({source.modules})"
    return f"{source.kind}: " + ", ".join(source.paths)


def _check_packages(packages: tuple[str, ...]) -> None:
    if not packages or len(set(packages)) < len(packages):
        raise ValueError(f"packages must be a list of different names, got {list(packages)}")
    if not all(package.isidentifier() for package in packages):
        raise ValueError(f"packages must be names such as stdlib or numpy, got {list(packages)}")
