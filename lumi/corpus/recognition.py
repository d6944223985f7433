"""Chat data without a config: where it lies, and in which format it is."""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.messages import Conversation, MalformedConversation
from lumi.chat.pairs import Pair
from lumi.config import UserError
from lumi.corpus.compression import ERRORS, open_file
from lumi.corpus.conversations import (
    AlpacaFormat,
    DollyFormat,
    MessagesFormat,
    PromptResponseFormat,
    ShareGptFormat,
)
from lumi.corpus.oasst import OasstFormat
from lumi.corpus.preferences import PreferenceFormat
from lumi.corpus.raw_records import RawRecord, read_pieces
from lumi.corpus.sources import (
    ConversationFormat,
    HubSource,
    JsonlSource,
    JsonSource,
    ParquetSource,
    describe,
)
from lumi.host.file_patterns import matching_files

FoundSource = HubSource | JsonlSource | JsonSource | ParquetSource

LOOKED_AT = 100  # records
_LISTS = ("messages", "conversations", "conversation")
_QUESTIONS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "response"),
    ("input", "output"),
)
# The first that reads the most records is taken, so the narrower ones stand first.
CANDIDATES: tuple[ConversationFormat, ...] = (
    *(PreferenceFormat(prompt_field=name) for name in ("prompt", *_LISTS[1:], "question")),
    *(MessagesFormat(field=name) for name in _LISTS),
    *(ShareGptFormat(field=name) for name in _LISTS),
    AlpacaFormat(),
    DollyFormat(),
    OasstFormat(),
    *(PromptResponseFormat(prompt_field=question, response_field=answer) for question, answer in _QUESTIONS),
)


class Recognised(NamedTuple):
    """A format, how many of the first records it reads, and the first of these."""

    format: ConversationFormat
    num_read: int
    num_records: int
    example: Conversation | Pair


def find_source(data: Sequence[str], split: str | None = None) -> FoundSource:
    """The source that paths, patterns or the name of a dataset on the hub mean, not yet with a format.

    Args:
        data: files of one kind (`.jsonl`, `.json`, `.parquet`, perhaps compressed), or one name such as
            "HuggingFaceH4/ultrachat_200k".
        split: of a dataset on the hub; None: "train".

    Raises:
        UserError: the files are of different kinds, or of another kind; a split of files.
    """
    if len(data) == 1 and not Path(data[0]).exists() and data[0].count("/") == 1 and "." not in data[0][-8:]:
        return HubSource(name="data", dataset=data[0], split=split or "train")
    if split is not None:
        raise UserError("--split", "must come with a dataset on the hub", got=f"{data[0]}, which is none")
    kinds = sorted({_kind(path) for path in data})
    if kinds == ["parquet"]:
        return ParquetSource(name="data", paths=tuple(data))
    if kinds != ["jsonl"]:
        expectation = "must be .jsonl, .json or .parquet files, all of one kind, or a dataset on the hub"
        remedy = "convert them, or use `lumi prepare`"
        raise UserError("the data", expectation, got=", ".join(data), remedy=remedy)
    kind = JsonSource if _is_array(data[0]) else JsonlSource
    return kind(name="data", paths=tuple(data))


def recognise(source: FoundSource) -> Recognised:
    """The format of a source's records, by the first ones.

    Raises:
        UserError: no format reads at least half of them.
    """
    records = _first_records(source)
    tried = [_try(candidate, records) for candidate in CANDIDATES]
    best = max(tried, key=lambda found: found.num_read, default=None) if records else None
    if best is None or 2 * best.num_read < len(records):
        fields = ", ".join(records[0]) if records else "no record"
        raise UserError(
            f"{describe(source)}:",
            "must hold conversations or pairs of answers in a known format",
            got=f"the fields {fields}"[:300] if records else fields,
            remedy="rename the fields as docs/data.md shows, or name them in a config of `lumi prepare`",
        )
    return best


def _first_records(source: FoundSource) -> list[dict[str, Any]]:
    if isinstance(source, ParquetSource):  # `read_pieces` would read the columns of a format alone
        path = matching_files(source.paths)[0]
        try:
            batches = pq.ParquetFile(path).iter_batches(batch_size=LOOKED_AT)
            return [] if (batch := next(batches, None)) is None else batch.to_pylist()
        except (OSError, pa.ArrowException) as error:
            raise UserError(f"{path}:", "must be a Parquet file", got=str(error).splitlines()[0]) from error
    pieces = islice(read_pieces(source), LOOKED_AT)
    return [piece.fields for piece in pieces if isinstance(piece, RawRecord)]


def _try(candidate: ConversationFormat, records: Sequence[dict[str, Any]]) -> Recognised:
    found = []
    for record in records:
        try:
            found.append(candidate.read(record))
        except MalformedConversation:
            continue
    return Recognised(candidate, len(found), len(records), found[0] if found else ())


def _kind(path: str) -> str:
    suffixes = Path(path).suffixes
    last = suffixes[-1] if suffixes else ""
    if last in (".gz", ".bz2", ".xz", ".zst") and len(suffixes) > 1:
        last = suffixes[-2]
    return {".ndjson": "jsonl", ".json": "jsonl"}.get(last, last.removeprefix("."))


def _is_array(path: str) -> bool:
    """Whether a JSON file is one array; if not, it holds an object per line."""
    if not Path(path).is_file():
        return False  # a pattern, or nothing: reading it says so
    try:
        with open_file(path) as file:
            return file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    except ERRORS:
        return False  # it is damaged: reading it says so
