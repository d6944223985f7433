"""Where text comes from: the config of each kind of source, and what identifies its content."""

import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from lumi.config import UserError, to_dict
from lumi.corpus.conversations import (
    AlpacaFormat,
    DollyFormat,
    MessagesFormat,
    PromptResponseFormat,
    ShareGptFormat,
)
from lumi.corpus.oasst import OasstFormat, OasstMessagesFormat
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
)


@dataclass(frozen=True, kw_only=True)
class AnySource:
    """What every source has: a name in reports, and a budget of what is kept of it."""

    name: str
    max_tokens: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        if not NAME.fullmatch(self.name):
            raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {self.name!r}")
        for key in ("max_tokens", "max_documents"):
            value = getattr(self, key)
            if value is not None and value < 1:
                raise ValueError(f"{key} must be at least 1, or null for all, got {value}")

    @property
    def holds_conversations(self) -> bool:
        """Whether its records are conversations, not texts."""
        return False


@dataclass(frozen=True, kw_only=True)
class RecordSource(AnySource):
    """A source of records with fields: a text in one of them, or a conversation, in one of the formats of chat data."""

    text_field: str = "text"
    conversation: ConversationFormat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.text_field == "":
            raise ValueError('text_field must be a name, got ""')
        if self.conversation is not None and self.text_field != "text":
            raise ValueError(
                f"text_field must be left out where conversation is given, got {self.text_field!r}"
            )

    @property
    def holds_conversations(self) -> bool:
        return self.conversation is not None


@dataclass(frozen=True, kw_only=True)
class HubSource(RecordSource):
    """A dataset on the Hugging Face hub, streamed: nothing beyond the budget is downloaded (but all rows of "oasst_messages")."""

    kind: Literal["hub"] = "hub"
    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("dataset", "split"):
            if getattr(self, key) == "":
                raise ValueError(f'{key} must be a name, got ""')


@dataclass(frozen=True, kw_only=True)
class JsonlSource(RecordSource):
    """Files with one JSON object per line, plain or gzip (`.gz`)."""

    kind: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.paths)


@dataclass(frozen=True, kw_only=True)
class JsonSource(RecordSource):
    """Files that hold one JSON array of objects, plain or gzip (`.gz`); each is held in memory while it is read."""

    kind: Literal["json"] = "json"
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.paths)


@dataclass(frozen=True, kw_only=True)
class ParquetSource(RecordSource):
    """Parquet files with a column of text, or the columns of a conversation."""

    kind: Literal["parquet"] = "parquet"
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.paths)


@dataclass(frozen=True, kw_only=True)
class TextSource(AnySource):
    """UTF-8 text files: a document per file, or the pieces between `separator` ("\\n\\n": blank lines), plain or gzip."""

    kind: Literal["text"] = "text"
    paths: tuple[str, ...]
    separator: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_patterns(self.paths)
        if self.separator == "":
            raise ValueError(
                'separator must be null (one document per file) or at least one character, got ""'
            )


@dataclass(frozen=True, kw_only=True)
class PythonDocsSource(AnySource):
    """The documentation inside this Python: "topics" (the language reference), "stdlib", and any installed package."""

    kind: Literal["python_docs"] = "python_docs"
    packages: tuple[str, ...] = ("topics", "stdlib", "numpy", "torch")

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packages(self.packages)


@dataclass(frozen=True, kw_only=True)
class PythonQuestionsSource(AnySource):
    """Questions about the modules, classes and functions of "stdlib" and installed packages, answered from their documentation.

    `modules`: whole modules are on one side, "train" or "held_out", so that two corpora share none; a hash of its name puts
    `held_out_fraction` of them there. `max_answer_chars`: an answer ends with the last sentence within this limit.
    """

    kind: Literal["python_questions"] = "python_questions"
    packages: tuple[str, ...] = ("stdlib",)
    modules: Literal["all", "train", "held_out"] = "all"
    held_out_fraction: float = 0.05
    max_answer_chars: int = 300

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_packages(self.packages)
        if "topics" in self.packages:
            raise ValueError(
                "packages must be stdlib or names of packages, got topics, of which nothing can be asked"
            )
        if not 0 < self.held_out_fraction < 1:
            raise ValueError(f"held_out_fraction must be within 0 and 1, got {self.held_out_fraction}")
        if self.max_answer_chars < 20:
            raise ValueError(f"max_answer_chars must be at least 20, got {self.max_answer_chars}")

    @property
    def holds_conversations(self) -> bool:
        return True


FileSource = JsonlSource | JsonSource | ParquetSource | TextSource
Source = (
    HubSource
    | JsonlSource
    | JsonSource
    | ParquetSource
    | TextSource
    | PythonDocsSource
    | PythonQuestionsSource
)


def find_files(source: FileSource) -> list[str]:
    """The files of a local source: its paths in order, the matches of each sorted.

    Raises:
        UserError: a path matches no file.
    """
    try:
        return matching_files(source.paths)
    except UserError as error:
        raise UserError(f"source {source.name!r}: {error}") from error


def identify(source: Source) -> dict[str, Any]:
    """What decides which documents a source gives: its config without name and budget, its files, its versions.

    Raises:
        UserError: a path matches no file, a package of `python_docs` or `python_questions` is not installed.
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
    stats = [(path, os.stat(path)) for path in find_files(source)]
    return config | {"files": [[path, stat.st_size, stat.st_mtime_ns] for path, stat in stats]}


def describe(source: Source) -> str:
    """One phrase for a report: kind and address."""
    if isinstance(source, HubSource):
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
