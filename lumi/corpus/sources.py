"""Where text comes from: the config of each kind of source, and what identifies its content."""

import glob
import os
import re
from dataclasses import dataclass
from typing import Any, Literal

from lumi.config import UserError, to_dict
from lumi.corpus.python_docs import LAYOUT_VERSION, installed_versions

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A dataset on the Hugging Face hub, streamed: nothing beyond the budget is downloaded."""

    kind: Literal["hub"] = "hub"
    name: str
    dataset: str
    subset: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"
    max_tokens: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        _check_source(self)


@dataclass(frozen=True, kw_only=True)
class JsonlSource:
    """Files with one JSON object per line, plain or gzip (`.gz`)."""

    kind: Literal["jsonl"] = "jsonl"
    name: str
    paths: tuple[str, ...]
    text_field: str = "text"
    max_tokens: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        _check_source(self)


@dataclass(frozen=True, kw_only=True)
class ParquetSource:
    """Parquet files with a column of text."""

    kind: Literal["parquet"] = "parquet"
    name: str
    paths: tuple[str, ...]
    text_field: str = "text"
    max_tokens: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        _check_source(self)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """UTF-8 text files: a document per file, or the pieces between `separator` ("\\n\\n": blank lines), plain or gzip."""

    kind: Literal["text"] = "text"
    name: str
    paths: tuple[str, ...]
    separator: str | None = None
    max_tokens: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        _check_source(self)
        if self.separator == "":
            raise ValueError('separator must be null (one document per file) or at least one character, got ""')


@dataclass(frozen=True, kw_only=True)
class PythonDocsSource:
    """The documentation inside this Python: "topics" (the language reference), "stdlib", and any installed package."""

    kind: Literal["python_docs"] = "python_docs"
    name: str
    packages: tuple[str, ...] = ("topics", "stdlib", "numpy", "torch")
    max_tokens: int | None = None
    max_documents: int | None = None

    def __post_init__(self) -> None:
        _check_source(self)
        if not self.packages or len(set(self.packages)) < len(self.packages):
            raise ValueError(f"packages must be a list of different names, got {list(self.packages)}")
        if not all(package.isidentifier() for package in self.packages):
            raise ValueError(f"packages must be names such as stdlib or numpy, got {list(self.packages)}")


Source = HubSource | JsonlSource | ParquetSource | TextSource | PythonDocsSource


def find_files(source: JsonlSource | ParquetSource | TextSource) -> list[str]:
    """The files of a local source: its paths in order, the matches of each sorted.

    Raises:
        UserError: a path matches no file.
    """
    found: dict[str, None] = {}
    for pattern in source.paths:
        matches = sorted(path for path in glob.glob(os.path.expanduser(pattern), recursive=True) if os.path.isfile(path))
        if not matches:
            raise UserError(
                f"source {source.name!r}: paths must match at least one file, got {pattern!r}"
                f" (looked from {os.getcwd()}); mend the path, or take it out"
            )
        found |= dict.fromkeys(matches)
    return list(found)


def identify(source: Source) -> dict[str, Any]:
    """What decides which documents a source gives: its config without name and budget, its files, its versions.

    Raises:
        UserError: a path matches no file, a package of `python_docs` is not installed.
    """
    config = {key: value for key, value in to_dict(source).items() if key not in ("name", "max_tokens", "max_documents")}
    if isinstance(source, PythonDocsSource):
        return config | {"versions": installed_versions(source.packages), "layout": LAYOUT_VERSION}
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
    return f"{source.kind}: " + ", ".join(source.paths)


def _check_source(source: Source) -> None:
    if not NAME.fullmatch(source.name):
        raise ValueError(f"name must be letters, digits, '.', '_' and '-', got {source.name!r}")
    for key in ("max_tokens", "max_documents"):
        value = getattr(source, key)
        if value is not None and value < 1:
            raise ValueError(f"{key} must be at least 1, or null for all, got {value}")
    for key in ("dataset", "split", "text_field"):
        if getattr(source, key, None) == "":
            raise ValueError(f'{key} must be a name, got ""')
    if isinstance(source, JsonlSource | ParquetSource | TextSource) and (not source.paths or "" in source.paths):
        raise ValueError(f"paths must hold at least one path or glob pattern, got {list(source.paths)}")
