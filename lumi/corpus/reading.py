"""Sources -> records, in a fixed order: every piece of a source is a text or a conversation, or a reason why there is none."""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, BinaryIO, NamedTuple, cast

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.messages import MalformedConversation
from lumi.config import UserError
from lumi.corpus.conversations import pack, read_string
from lumi.corpus.oasst import OasstMessagesFormat
from lumi.corpus.python_docs import read_python_docs
from lumi.corpus.python_questions import read_questions
from lumi.corpus.sources import (
    FileSource,
    HubSource,
    JsonlSource,
    JsonSource,
    ParquetSource,
    PythonDocsSource,
    PythonQuestionsSource,
    RecordSource,
    Source,
    find_files,
)

CHUNK_BYTES = 1 << 20


class Record(NamedTuple):
    """`text` (of a conversation what `pack` makes of it), or None with the reason and, in `detail`, the place and what is wrong there."""

    text: str | None
    reason: str = ""
    detail: str = ""


class Row(NamedTuple):
    """What a file or a dataset holds at one place: plain values, not looked into yet."""

    data: Any
    place: str


class OpenSource(NamedTuple):
    """The records of a source, and facts about it that belong in the manifest."""

    facts: dict[str, Any]
    records: Iterator[Record]


def open_source(source: Source, max_chars: int, skip: int = 0) -> OpenSource:
    """Begin to read a source behind its first `skip` records; pieces far longer than `max_chars` are never held in memory.

    Raises:
        UserError: a path matches no file, a file cannot be read, the hub cannot be reached.
    """
    if isinstance(source, PythonDocsSource):
        facts, documents = read_python_docs(source.packages)
        return OpenSource(facts, map(Record, islice(documents, skip, None)))
    if isinstance(source, PythonQuestionsSource):
        facts, answers = read_questions(
            source.packages, source.modules, source.held_out_fraction, source.max_answer_chars
        )
        records = (
            Record(None, found) if isinstance(found, str) else Record(pack(found)) for found in answers
        )
        return OpenSource(facts, islice(records, skip, None))
    if isinstance(source, HubSource) and not isinstance(source.conversation, OasstMessagesFormat):
        return OpenSource({}, _to_records(_read_hub(source, skip), source))  # the server skips
    rows = _read_hub(source, 0) if isinstance(source, HubSource) else _read_files(source, max_chars)
    return OpenSource({}, islice(_to_records(rows, source), skip, None))


def _to_records(rows: Iterable[Row | Record], source: Source) -> Iterator[Record]:
    if isinstance(source, RecordSource) and isinstance(source.conversation, OasstMessagesFormat):
        rows = _join_trees(rows, source.conversation)
    for row in rows:
        if isinstance(row, Record):
            yield row
        elif not isinstance(row.data, dict):
            yield Record(
                None, "malformed_json", f"{row.place}: must be an object, got {type(row.data).__name__}"
            )
        else:
            assert isinstance(source, RecordSource)
            yield _pick(row.data, source, row.place)


def _pick(data: dict[str, Any], source: RecordSource, place: str) -> Record:
    try:
        if source.conversation is None:
            return Record(read_string(data, source.text_field))
        return Record(pack(source.conversation.read(data)))
    except MalformedConversation as finding:
        return Record(None, finding.reason, f"{place}: {finding}" if str(finding) else "")


def _join_trees(rows: Iterable[Row | Record], conversation: OasstMessagesFormat) -> Iterator[Row | Record]:
    """The rows of each tree as one row, in the order in which the trees begin; what is no row of a tree goes through, before them."""
    trees: dict[str, Row] = {}
    for row in rows:
        if isinstance(row, Record) or not isinstance(row.data, dict):
            yield row
            continue
        identity = row.data.get("message_tree_id")
        if not isinstance(identity, str):
            yield Row({"rows": [row.data]}, row.place)
            continue
        fields = {
            key: row.data[key] for key in conversation.required + conversation.optional if key in row.data
        }
        trees.setdefault(identity, Row({"rows": []}, row.place)).data["rows"].append(fields)
    while trees:  # given up as they go: all of them are held
        yield trees.pop(next(iter(trees)))


def _read_files(source: FileSource, max_chars: int) -> Iterator[Row | Record]:
    for path in find_files(source):
        try:
            if isinstance(source, JsonlSource):
                yield from _read_jsonl(path, max_chars)
            elif isinstance(source, JsonSource):
                yield from _read_json(path, source)
            elif isinstance(source, ParquetSource):
                yield from _read_parquet(path, source)
            else:
                yield from _read_text(path, source.separator, max_chars)
        except (OSError, EOFError, zlib.error, pa.ArrowException) as error:
            message = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(
                f"source {source.name!r}: {path} must be a readable {source.kind} file, got: {message}"
            ) from error


def _open(path: str) -> BinaryIO:
    return cast(BinaryIO, gzip.open(path, "rb")) if path.endswith(".gz") else open(path, "rb")


def _read_jsonl(path: str, max_chars: int) -> Iterator[Row | Record]:
    # One character is at most 12 bytes in JSON ("\\ud83d\\ude00"); the rest of the line may be other fields.
    limit = 12 * max_chars + CHUNK_BYTES
    with _open(path) as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if len(line) >= limit and not line.endswith(b"\n"):
                while (rest := file.readline(CHUNK_BYTES)) and not rest.endswith(b"\n"):
                    pass
                row: Row | Record = Record(
                    None, "too_long", f"{path}:{number}: a line of more than {limit} bytes"
                )
            elif line.strip():
                row = _parse_line(line, f"{path}:{number}")
            else:
                continue
            yield _refuse_array(row) if number == 1 and line.lstrip().startswith(b"[") else row


def _refuse_array(row: Row | Record) -> Record:
    """The first line of what is probably the other kind of JSON file."""
    if isinstance(row, Row):
        row = Record(None, "malformed_json", f"{row.place}: must be an object, got {type(row.data).__name__}")
    return row._replace(detail=f'{row.detail}; for a file that is one JSON array use kind "json"')


def _parse_line(line: bytes, place: str) -> Row | Record:
    try:
        return Row(json.loads(line.decode("utf-8")), place)
    except UnicodeDecodeError as error:
        return Record(None, "invalid_utf8", f"{place}: invalid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Record(None, "malformed_json", f"{place}: {error}")


def _read_json(path: str, source: JsonSource) -> Iterator[Row]:
    with _open(path) as file:
        data = file.read()
    try:
        items = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        items = error
    if not isinstance(items, list):
        got = str(items) if isinstance(items, Exception) else f"{type(items).__name__}"
        raise UserError(
            f'source {source.name!r}: {path} must hold one JSON array of objects, got: {got}; for one object per line use kind "jsonl"'
        )
    for number, item in enumerate(items, start=1):
        yield Row(item, f"{path}:item {number}")


def _read_parquet(path: str, source: ParquetSource) -> Iterator[Row | Record]:
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        if source.conversation is None:
            if source.text_field not in names:
                raise UserError(
                    f"source {source.name!r}: text_field must be a column of {path} ({', '.join(names)}), got {source.text_field!r}"
                )
            yield from _read_column(file, path, source)
        else:
            required, optional = source.conversation.required, source.conversation.optional
            if not set(required) <= set(names):
                raise UserError(
                    f"source {source.name!r}: {path} must have the columns {', '.join(required)}, got {', '.join(names)}"
                )
            yield from _read_columns(file, path, [name for name in names if name in required + optional])


def _read_column(file: pq.ParquetFile, path: str, source: ParquetSource) -> Iterator[Record]:
    kind = file.schema_arrow.field(source.text_field).type
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(
            f"source {source.name!r}: column {source.text_field!r} of {path} must hold strings, got {kind}"
        )
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=[source.text_field]):
        # As bytes: Arrow does not check that a string column is UTF-8.
        for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
            row += 1
            yield (
                _decode(value, f"{path}:row {row}")
                if value is not None
                else Record(None, "missing_text", f"{path}:row {row}: null")
            )


def _read_columns(file: pq.ParquetFile, path: str, names: list[str]) -> Iterator[Row | Record]:
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=names):
        for index in range(len(batch)):  # one by one, so that invalid UTF-8 spoils one row only
            row += 1
            try:
                yield Row(batch.slice(index, 1).to_pylist()[0], f"{path}:row {row}")
            except UnicodeDecodeError as error:
                yield Record(None, "invalid_utf8", f"{path}:row {row}: invalid UTF-8 at byte {error.start}")


def _decode(data: bytes, place: str) -> Record:
    try:
        return Record(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(None, "invalid_utf8", f"{place}: invalid UTF-8 at byte {error.start}")


def _read_text(path: str, separator: str | None, max_chars: int) -> Iterator[Record]:
    limit = 4 * max_chars  # bytes; UTF-8 has at most four for a character
    for number, piece in _split(path, separator, limit):
        if piece is None:
            yield Record(None, "too_long", f"{path}:{number}: more than {limit} bytes in one document")
        elif separator is None:
            yield _decode(piece.removeprefix(b"\xef\xbb\xbf"), path)
        elif stripped := piece.removeprefix(b"\xef\xbb\xbf").strip(
            b"\n"
        ):  # separators in a row hold nothing between them
            yield _decode(stripped, f"{path}:{number + len(piece) - len(piece.lstrip(bytes([10])))}")


def _split(path: str, separator: str | None, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number, piece) for the pieces between separators; None for a piece of more than `limit` bytes."""
    mark = separator.encode() if separator else None
    number, passed_lines, buffer, too_long = 1, 0, b"", False
    with _open(path) as file:
        while chunk := file.read(CHUNK_BYTES):
            if mark and b"\r" in chunk:
                chunk += file.read(1) if chunk.endswith(b"\r") else b""
                chunk = chunk.replace(b"\r\n", b"\n")
            buffer += chunk
            if mark:
                *pieces, buffer = buffer.split(mark)
                for piece in pieces:
                    yield number, None if too_long or len(piece) > limit else piece
                    number += passed_lines + (piece + mark).count(b"\n")
                    passed_lines, too_long = 0, False
            if len(buffer) > limit:  # forget it, but for the first half of a separator that was cut in two
                keep = len(buffer) - len(mark) + 1 if mark else len(buffer)
                passed_lines += buffer.count(b"\n", 0, keep)
                buffer, too_long = buffer[keep:], True
    yield number, None if too_long or len(buffer) > limit else buffer


def _read_hub(source: HubSource, skip: int) -> Iterator[Row]:
    import datasets  # takes seconds to import, and only this kind of source needs it

    address = f"{source.dataset}{f' ({source.subset})' if source.subset else ''}, split {source.split!r}"
    try:
        stream = datasets.load_dataset(
            source.dataset, source.subset, split=source.split, revision=source.revision, streaming=True
        )
        for number, example in enumerate(stream.skip(skip) if skip else stream, start=skip + 1):
            yield Row(example, f"{source.dataset}:row {number}")
    except (
        Exception
    ) as error:  # network, server, file formats: datasets raises the errors of a dozen libraries
        message = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        raise UserError(
            f"source {source.name!r}: cannot read the hub dataset {address}: {message}; check its name and your network"
            " (behind a gate: `hf auth login`), then run again with --use-cache, or use a local source"
        ) from error
