"""The outcomes of one source's records, on disk in parts: an interrupted run goes on after the last part."""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.config import UserError, read_json, write_json
from lumi.corpus.deduplication import Fingerprint
from lumi.corpus.documents import Attribution, Document, Kind, from_plain, to_plain
from lumi.corpus.processing import Outcome
from lumi.corpus.review import Glimpse

PART = re.compile(r"part-(\d{6})-([0-9a-f]{64})\.parquet")  # number and SHA-256
SCHEMA = pa.schema(
    [
        ("text", pa.large_string()),  # of a conversation or a pair: its JSON
        ("digest", pa.binary()),
        ("normalized", pa.binary()),
        ("signature", pa.binary()),
        ("num_bytes", pa.int64()),
        ("reason", pa.string()),
        ("detail", pa.string()),
        ("shortened", pa.bool_()),
        ("unused", pa.list_(pa.string())),
        ("replaced", pa.list_(pa.int64())),
        ("license", pa.string()),
        ("url", pa.string()),
        ("num_chars", pa.int64()),
        ("rank", pa.uint64()),
        ("excerpt", pa.string()),
        ("language", pa.string()),
    ]
)


class SourceCache:
    """One folder: parts named by number and SHA-256, `facts.json`, and at the end `complete.json`.

    Args:
        folder: of this cache alone.
        kind: what the documents are.
        writable: without it, nothing is written or deleted.
    """

    def __init__(self, folder: Path, *, kind: Kind, writable: bool) -> None:
        self.folder, self.kind, self.writable = folder, kind, writable
        self._num_parts = 0

    def clear(self) -> None:
        """Forget everything."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def read(self) -> Iterator[list[Outcome]]:
        """The parts in order, verified. A damaged one ends them; a writable cache deletes it."""
        self._num_parts = 0
        if self.facts() is not None:
            for path in self._list_parts():
                outcomes = _read_part(path, self.kind)
                if outcomes is None:
                    redone = "it is made again" if self.writable else "it is left out"
                    print(f"lumi: {path}: this part of the cache is damaged, {redone}", file=sys.stderr)
                    break
                self._num_parts += 1
                yield outcomes
        self._forget_rest()

    def read_part(self, number: int) -> list[Outcome]:
        """One part of a finished cache, by its number from 0. Raises UserError if it is not whole."""
        for path in self.folder.glob(f"part-{number:06d}-*.parquet"):
            outcomes = _read_part(path, self.kind)
            if outcomes is not None:
                return outcomes
        raise UserError(
            f"part {number} of {self.folder}",
            "must be there and whole",
            remedy="run without --use-cache to make it again",
        )

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Add the next part."""
        if not self.writable:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        data = _serialize(outcomes)
        path = self.folder / f"part-{self._num_parts:06d}-{hashlib.sha256(data).hexdigest()}.parquet"
        temporary = path.with_suffix(".tmp")
        temporary.write_bytes(data)
        os.replace(temporary, path)
        self._num_parts += 1

    def is_complete(self) -> bool:
        """Whether the parts that were read or written are all of the source."""
        return self._load("complete.json") == {"parts": self._num_parts}

    def finish(self) -> None:
        """Record that the source is exhausted."""
        self._save("complete.json", {"parts": self._num_parts})

    def facts(self) -> dict[str, Any] | None:
        """What was found out when the source was opened, before the first part; None if it never was."""
        return self._load("facts.json")

    def save_facts(self, facts: dict[str, Any]) -> None:
        """Keep what was found out when the source was opened."""
        self._save("facts.json", facts)

    def _save(self, name: str, data: dict[str, Any]) -> None:
        if self.writable:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / name, data)

    def _load(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.exists():
            return None
        try:
            data = read_json(path)
        except UserError as error:
            print(f"lumi: {error}; this part of the cache is made again", file=sys.stderr)
            return None
        return data if isinstance(data, dict) else None

    def _list_parts(self) -> list[Path]:
        """The parts 0, 1, 2 ... up to the first gap."""
        found = {
            int(match[1]): path
            for path in self.folder.glob("part-*.parquet")
            if (match := PART.fullmatch(path.name))
        }
        return [found[number] for number in range(len(found)) if set(range(number + 1)) <= found.keys()]

    def _forget_rest(self) -> None:
        """Delete what comes after the parts that were read, and half-written parts."""
        rest = [
            path
            for path in self.folder.glob("part-*")
            if not (match := PART.fullmatch(path.name)) or int(match[1]) >= self._num_parts
        ]
        if self.writable and rest:
            (self.folder / "complete.json").unlink(missing_ok=True)
            for path in rest:
                path.unlink()


def cache_key(identity: Any) -> str:
    """A short hash of plain JSON values."""
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]


def to_table(outcomes: Sequence[Outcome]) -> pa.Table:
    """Outcomes as a table of SCHEMA."""
    columns = {
        "text": [_to_text(outcome.document) for outcome in outcomes],
        **{
            field: [outcome.fingerprint and getattr(outcome.fingerprint, field) for outcome in outcomes]
            for field in Fingerprint._fields
        },
        "num_bytes": [outcome.num_bytes for outcome in outcomes],
        "reason": [outcome.reason for outcome in outcomes],
        "detail": [_valid(outcome.detail) for outcome in outcomes],
        "shortened": [outcome.shortened for outcome in outcomes],
        "unused": [[_valid(name) for name in outcome.unused] for outcome in outcomes],
        "replaced": [outcome.replaced for outcome in outcomes],
        **{
            field: [getattr(outcome.attribution, field) for outcome in outcomes]
            for field in Attribution._fields
        },
        **{field: [getattr(outcome.glimpse, field) for outcome in outcomes] for field in Glimpse._fields},
    }
    return pa.Table.from_pydict(columns, schema=SCHEMA)


def from_table(table: pa.Table, kind: Kind) -> list[Outcome]:
    """The outcomes that `to_table` was given; `kind` is what their documents are."""
    rows = zip(*(column.to_pylist() for column in table.columns), strict=True)
    outcomes = []
    for text, digest, normalized, signature, num_bytes, reason, detail, shortened, unused, *more in rows:
        plain = text if text is None or kind == "texts" else json.loads(text)
        document = None if plain is None else from_plain(plain, kind)
        found = None if digest is None else Fingerprint(digest, normalized, signature)
        replaced, attribution, glimpse = tuple(more[0]), Attribution(*more[1:3]), Glimpse(*more[3:])
        named = (tuple(unused), replaced, attribution, glimpse)
        outcomes.append(Outcome(document, found, num_bytes, reason, detail, shortened, *named))
    return outcomes


def _serialize(outcomes: Sequence[Outcome]) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(to_table(outcomes), sink, compression="zstd")
    return sink.getvalue().to_pybytes()


def _valid(text: str) -> str:
    return text.encode("utf-8", "replace").decode()  # lone surrogates become "?"


def _to_text(document: Document | None) -> str | None:
    if isinstance(document, str | None):
        return document
    return json.dumps(to_plain(document), ensure_ascii=False)


def _read_part(path: Path, kind: Kind) -> list[Outcome] | None:
    data = path.read_bytes()
    match = PART.fullmatch(path.name)
    assert match is not None
    if hashlib.sha256(data).hexdigest() != match[2]:
        return None
    return from_table(pq.read_table(pa.BufferReader(data)), kind)
