"""Where evaluation data comes from: the config of each kind of source, and its records in order.

What is evaluated decides a published figure, so nothing is skipped here: a record that cannot be read is an error.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lumi.config import UserError
from lumi.host.file_patterns import check_patterns, matching_files
from lumi.host.text import utf8

Record = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class HubSource:
    """A dataset on the Hugging Face hub, streamed."""

    kind: Literal["hub"] = "hub"
    dataset: str
    subset: str | None = None
    split: str = "validation"
    revision: str | None = None

    def __post_init__(self) -> None:
        for key in ("dataset", "split"):
            if not getattr(self, key):
                raise ValueError(f'{key} must be a name, got ""')


@dataclass(frozen=True, kw_only=True)
class JsonlSource:
    """Files with one JSON object per line, with the fields that the dataset has on the hub."""

    kind: Literal["jsonl"] = "jsonl"
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        check_patterns(self.paths)


@dataclass(frozen=True, kw_only=True)
class TextSource:
    """UTF-8 text files, a document each."""

    kind: Literal["text"] = "text"
    paths: tuple[str, ...]

    def __post_init__(self) -> None:
        check_patterns(self.paths)


def read_records(source: HubSource | JsonlSource | TextSource, limit: int | None = None) -> list[Record]:
    """The first `limit` records of a source (None: all), in its order; a text file is the record {"text": ...}.

    Raises:
        UserError: a path matches no file, a file or a line cannot be read (names the line), the hub cannot be reached, no records.
    """
    if isinstance(source, HubSource):
        records = _read_hub(source, limit)
    else:
        read = _read_jsonl if isinstance(source, JsonlSource) else _read_text
        found = itertools.chain.from_iterable(read(path) for path in map(Path, matching_files(source.paths)))
        records = list(itertools.islice(found, limit))
    if not records:
        raise UserError(f"{describe(source)}: must hold at least one record, got none")
    return records


def describe(source: HubSource | JsonlSource | TextSource) -> str:
    """One phrase for messages and reports: kind and address."""
    if isinstance(source, HubSource):
        return "hub: " + " / ".join(
            part for part in (source.dataset, source.subset, source.split, source.revision) if part
        )
    return f"{source.kind}: " + ", ".join(source.paths)


def text_field(record: Record, name: str, place: str) -> str:
    """A field that must be a string of valid Unicode. Raises UserError naming the place, the field, and those that there are."""
    value = record.get(name)
    if not isinstance(value, str):
        got = (
            f"no such field (it has {', '.join(record) or 'none'})"
            if name not in record
            else type(value).__name__
        )
        raise UserError(f"{place}: {name!r} must be a string, got {got}")
    check_unicode(value, name, place)
    return value


def check_unicode(text: str, name: str, place: str) -> None:
    """Raises UserError naming the place and the field of a text that could not be encoded."""
    try:
        utf8(text)
    except UserError as error:
        raise UserError(f"{place}: {name!r}: {error}") from error


def tightest(*limits: int | None) -> int | None:
    """The smallest limit; None is no limit."""
    return min((limit for limit in limits if limit is not None), default=None)


def _read_utf8(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        mark = len(path.read_bytes()) - len(error.object)  # the decoder counts behind a byte order mark
        raise UserError(f"{path}: must be UTF-8, got another byte at {mark + error.start}") from error


def _read_text(path: Path) -> Iterator[Record]:
    yield {"text": _read_utf8(path)}


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in enumerate(_read_utf8(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{path}:{number}: must be a JSON object, got a line that is not valid JSON: {error}"
            ) from error
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number}: must be a JSON object, got {type(record).__name__}")
        yield record


def _read_hub(source: HubSource, limit: int | None) -> list[Record]:
    import datasets  # takes seconds to import, and only this kind of source needs it

    try:
        stream = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        return [dict(record) for record in itertools.islice(stream, limit)]
    except (
        Exception
    ) as error:  # network, server, file formats: datasets raises the errors of a dozen libraries
        message = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"{describe(source)}: cannot be read: {message}; check its name and your network (behind a gate: `hf auth login`), or use "
            f"local files: a source of kind jsonl with the same fields"
        ) from error
