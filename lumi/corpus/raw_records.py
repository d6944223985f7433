"""Locations -> raw records in a fixed order: files and datasets are cut into pieces, nothing is interpreted.

The stage `prepare` counts the pieces that cannot be read. `lumi evaluate` refuses them, by `read_records`.
"""

import csv
import io
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.config import UserError, unique_keys
from lumi.corpus.compression import ERRORS, find_compression, open_file
from lumi.corpus.documents import Record
from lumi.corpus.sources import (
    CsvSource,
    Files,
    HubDataset,
    JsonFiles,
    JsonlFiles,
    Location,
    ParquetSource,
    TextSource,
    describe,
)
from lumi.host.file_patterns import matching_files

CHUNK_BYTES = 1 << 20
UNLIMITED = 1 << 40
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
BROKEN = re.compile("[\udc80-\udcff]")  # what "surrogateescape" makes of bytes that are not UTF-8


class RawRecord(NamedTuple):
    """The fields that stand at one place of a file or a dataset.

    `unread`: the names of other fields, which were left where they are.
    """

    fields: dict[str, Any]
    place: str
    unread: tuple[str, ...] = ()


Fields = dict[str, Any]  # of one record
Piece = RawRecord | Record  # a text, or something that cannot be read, is a Record already


def read_pieces(
    location: Location | ParquetSource | CsvSource, *, max_chars: int = UNLIMITED, skip: int = 0
) -> Iterator[Piece]:
    """What stands at a location, piece by piece, after the first `skip` pieces.

    A piece far longer than `max_chars` characters is passed over in chunks and never held in memory.

    Raises:
        UserError: a path matches no file, a file cannot be read, or the hub cannot be reached.
    """
    if isinstance(location, HubDataset):
        return _read_hub(location, skip)
    return islice(_read_files(location, max_chars), skip, None)


def read_records(location: Location, limit: int | None = None) -> list[Fields]:
    """The first `limit` records of a location (None: all) in its order; a text file is {"text": ...}.

    Raises:
        UserError: a path matches no file, a file or a line cannot be read (names the line), the hub cannot be
            reached, or there are no records.
    """
    records = list(map(_require, islice(read_pieces(location), limit)))
    if not records:
        raise UserError(f"{describe(location)}:", "must hold at least one record", got="none")
    return records


def _require(piece: Piece) -> Fields:
    if isinstance(piece, RawRecord):
        return piece.fields
    if not isinstance(piece.document, str):
        raise UserError(piece.detail)
    return {"text": piece.document.replace("\r\n", "\n").replace("\r", "\n")}


def _read_hub(dataset: HubDataset, skip: int) -> Iterator[RawRecord]:
    import datasets  # takes seconds to import, and only this kind of location needs it

    try:
        stream = datasets.load_dataset(
            dataset.dataset, dataset.subset, split=dataset.split, revision=dataset.revision, streaming=True
        )
        # The server skips rows much faster than we read them.
        for number, fields in enumerate(stream.skip(skip) if skip else stream, start=skip + 1):
            yield RawRecord(dict(fields), f"{dataset.dataset}:row {number}")
    except (
        Exception
    ) as error:  # network, server, file formats: `datasets` raises the errors of a dozen libraries
        raise UserError(
            f"{describe(dataset)} cannot be read: {_first_line(error)[:200]}",
            remedy="check its name and your network (behind a gate: `hf auth login`), or use local files",
        ) from error


def _read_files(files: Files, max_chars: int) -> Iterator[Piece]:
    for path in matching_files(files.paths):
        try:
            if isinstance(files, JsonlFiles):
                yield from _read_jsonl(path, 12 * max_chars + CHUNK_BYTES)
            elif isinstance(files, JsonFiles):
                yield from _read_json(path)
            elif isinstance(files, ParquetSource):
                yield from _read_parquet(path, files)
            elif isinstance(files, CsvSource):
                yield from _read_csv(path, files, max_chars + CHUNK_BYTES)
            else:
                separator = files.separator if isinstance(files, TextSource) else None
                yield from _read_text(path, separator, 4 * max_chars)
        except ERRORS as error:
            raise UserError(path, f"must be a readable {files.kind} file", got=_first_line(error)) from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _read_jsonl(path: str, limit: int) -> Iterator[Piece]:
    # `limit` in bytes: a character takes at most 12 in JSON ("\\ud83d\\ude00"), other fields take the rest.
    with open_file(path) as file:
        number = 0
        while line := file.readline(limit):
            number += 1
            if number == 1:
                line = line.removeprefix(BYTE_ORDER_MARK)
            if len(line) >= limit and not line.endswith(b"\n"):
                while (rest := file.readline(CHUNK_BYTES)) and not rest.endswith(b"\n"):
                    pass
                piece: Piece = Record(None, "too_long", f"{path}:{number}: a line of more than {limit} bytes")
            elif line.strip():
                piece = _parse_line(line, f"{path}:{number}")
            else:
                continue
            if number == 1 and line.lstrip().startswith(b"[") and isinstance(piece, Record):
                hint = 'for a file that is one JSON array use kind "json"'
                piece = piece._replace(detail=f"{piece.detail}; {hint}")
            yield piece


def _parse_line(line: bytes, place: str) -> Piece:
    try:
        return _check_object(_parse(line.decode("utf-8")), place)
    except UnicodeDecodeError as error:
        return Record(None, "invalid_utf8", f"{place}: invalid UTF-8 at byte {error.start} of the line")
    except (ValueError, RecursionError) as error:
        return Record(None, "malformed_json", f"{place}: not valid JSON: {error}")


def _parse(text: str) -> Any:
    """JSON as Python reads it, but a name that stands twice in an object is an error: one value is lost."""
    return json.loads(text, object_pairs_hook=unique_keys)


def _check_object(data: Any, place: str) -> Piece:
    if isinstance(data, dict):
        return RawRecord(data, place)
    return Record(None, "malformed_json", f"{place}: must be an object, got {type(data).__name__}")


def _read_json(path: str) -> Iterator[Piece]:
    with open_file(path) as file:
        data = file.read()
    try:
        items = _parse(data.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        items = error
    if not isinstance(items, list):
        raise UserError(
            path,
            "must hold one JSON array of objects",
            got=items if isinstance(items, Exception) else type(items).__name__,
            remedy='for one object per line use kind "jsonl"',
        )
    for number, item in enumerate(items, start=1):
        yield _check_object(item, f"{path}:item {number}")


def _read_parquet(path: str, source: ParquetSource) -> Iterator[Piece]:
    if (how := find_compression(path)) is not None:
        raise UserError(path, "must be a plain Parquet file", got=f"one in {how}", remedy="unpack it first")
    with pq.ParquetFile(path) as file:
        names = file.schema_arrow.names
        fields = {"score_field": source.score_field, "license_field": source.license_field}
        fields |= {"url_field": source.url_field}
        if source.conversation is None:
            fields["text_field"] = source.text_field
        for key, name in fields.items():
            if name is not None and name not in names:
                raise UserError(key, f"must be a column of {path} ({', '.join(names)})", got=repr(name))
        if source.conversation is None:
            used = [source.text_field, *source.more_fields]
        else:
            required, optional = source.conversation.required, source.conversation.optional
            if not set(required) <= set(names):
                raise UserError(
                    path, f"must have the columns {', '.join(required)}", got=", ".join(names) or "none"
                )
            used = [name for name in names if name in required + optional + source.more_fields]
        if twice := _named_twice([field for field in file.schema_arrow if field.name in used]):
            got = f"{' and '.join(map(repr, twice))} more than once"
            raise UserError(path, "must have columns of different names", got=got, remedy="rename one")
        if source.conversation is None:
            _check_strings(file, path, source.text_field)
        unread = tuple(name for name in names if name not in used)
        if used == [source.text_field]:
            yield from _read_column(file, path, source.text_field, unread)
        else:
            yield from _read_columns(file, path, used, unread)


def _named_twice(fields: Sequence[pa.Field]) -> list[str]:
    """The names that stand twice among columns, or among the fields within one of them."""
    names = [field.name for field in fields]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    for field in fields:
        twice += _named_twice([field.type.field(index) for index in range(field.type.num_fields)])
    return twice


def _check_strings(file: pq.ParquetFile, path: str, name: str) -> None:
    kind = _kind_of(file, name)
    if not (pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)):
        raise UserError(f"column {name!r} of {path}", "must hold strings", got=kind)


def _kind_of(file: pq.ParquetFile, name: str) -> pa.DataType:
    kind = file.schema_arrow.field(name).type
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _read_column(file: pq.ParquetFile, path: str, name: str, unread: tuple[str, ...]) -> Iterator[Record]:
    kind, row = _kind_of(file, name), 0
    for batch in file.iter_batches(batch_size=256, columns=[name]):
        # As bytes: Arrow does not check that a string column is UTF-8.
        for value in batch.column(0).cast(kind).cast(pa.large_binary()).to_pylist():
            row += 1
            if value is None:
                record = Record(None, "missing_text", f"{path}:row {row}: null")
            else:
                record = _decode(value, f"{path}:row {row}")
            yield record._replace(unused=unread)


def _read_columns(
    file: pq.ParquetFile, path: str, names: list[str], unread: tuple[str, ...]
) -> Iterator[Piece]:
    row = 0
    for batch in file.iter_batches(batch_size=256, columns=names):
        for index in range(len(batch)):  # one by one, so that invalid UTF-8 spoils one row only
            row += 1
            try:
                yield RawRecord(batch.slice(index, 1).to_pylist()[0], f"{path}:row {row}", unread)
            except UnicodeDecodeError as error:
                yield Record(None, "invalid_utf8", f"{path}:row {row}: invalid UTF-8 at byte {error.start}")


def _decode(data: bytes, place: str) -> Record:
    try:
        return Record(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Record(None, "invalid_utf8", f"{place}: invalid UTF-8 at byte {error.start}")


def _read_csv(path: str, source: CsvSource, limit: int) -> Iterator[Piece]:
    """`limit`: of a field, in characters. The library keeps it for the whole process."""
    csv.field_size_limit(limit)
    with open_file(path) as file:
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        rows = csv.reader(iter(lambda: text.readline(limit), ""), delimiter=source.delimiter, strict=True)
        names = _read_header(path, rows, source)
        while True:
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield Record(None, "malformed_csv", f"{path}:{rows.line_num}: {error}")
                continue
            place = f"{path}:{rows.line_num}"
            if not row:
                continue
            if len(row) != len(names):
                detail = f"{place}: {len(row)} fields, the header has {len(names)}"
                yield Record(None, "malformed_csv", detail)
            elif any(map(BROKEN.search, row)):
                yield Record(None, "invalid_utf8", f"{place}: invalid UTF-8 in the row that ends here")
            else:
                yield RawRecord(dict(zip(names, row, strict=True)), place)


def _read_header(path: str, rows: Iterator[list[str]], source: CsvSource) -> list[str]:
    try:
        names = next(rows, [])
    except csv.Error as error:
        raise UserError(path, "must begin with the names of its columns", got=error) from error
    wanted = source.conversation.required if source.conversation else (source.text_field,)
    missing = [name for name in (*wanted, *source.more_fields) if name not in names]
    if missing:
        got = f"{', '.join(names)[:200] or 'nothing'} in its first line"
        raise UserError(path, f"must have the columns {', '.join(missing)}", got=got)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        got = f"{', '.join(map(repr, twice))} more than once"
        raise UserError(path, "must have columns of different names", got=got, remedy="rename one")
    return names


def _read_text(path: str, separator: str | None, limit: int) -> Iterator[Record]:
    # `limit` in bytes: UTF-8 has at most four for a character.
    for number, piece in _split(path, separator, limit):
        if piece is None:
            yield Record(None, "too_long", f"{path}:{number}: more than {limit} bytes in one document")
            continue
        piece = piece.removeprefix(BYTE_ORDER_MARK)
        if separator is None:
            yield _decode(piece, path)
        elif stripped := piece.strip(b"\n"):  # nothing stands between two separators in a row
            yield _decode(stripped, f"{path}:{number + len(piece) - len(piece.lstrip(bytes([10])))}")


def _split(path: str, separator: str | None, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """(line number, piece) for the pieces between separators; None for a piece of more than `limit` bytes."""
    mark = separator.replace("\r\n", "\n").encode() if separator else None
    number, passed_lines, buffer, too_long = 1, 0, b"", False
    with open_file(path) as file:
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
