"""The corpus folder: Parquet shards and `manifest.json`, written whole or not at all, verified when read.

A corpus holds texts, conversations or pairs. Its columns are `text`, or `messages`, or `prompt`, `chosen` and
`rejected`; and `source`.
"""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.messages import Conversation
from lumi.chat.pairs import Pair
from lumi.config import UserError, read_json, write_json
from lumi.corpus.documents import Document, Kind, from_plain, text_of, to_plain
from lumi.host.storage import sha256_file

KIND = "lumi-corpus"
FORMAT = 1
ROW_GROUP_BYTES = 8 << 20  # of text; what a reader holds in memory
# Messages, and pairs, as the libraries of the hub read and write them.
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
SCHEMAS: dict[Kind, pa.Schema] = {
    "texts": pa.schema([("text", pa.string()), ("source", pa.string())]),
    "conversations": pa.schema([("messages", MESSAGES), ("source", pa.string())]),
    "pairs": pa.schema([*((name, MESSAGES) for name in Pair._fields), ("source", pa.string())]),
}
MAKE_ONE = "lumi prepare --config CONFIG --output-dir"
SHARD_KEYS = ("bytes", "documents", "file", "sha256")

Manifest = dict[str, Any]


class CorpusBatch(NamedTuple):
    """Successive documents: their texts, and the name of the source of each."""

    texts: list[str]
    sources: list[str]


class ConversationBatch(NamedTuple):
    """Successive conversations, and the name of the source of each."""

    conversations: list[Conversation]
    sources: list[str]


class CorpusReader:
    """A finished corpus folder. Each shard's SHA-256 is checked before it is read.

    `iter_batches`, `iter_shard` and iteration give the documents of a corpus of texts, `iter_conversations`
    those of a corpus of conversations, `iter_documents` those of any corpus, and `iter_texts` their text.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.manifest = folder, manifest

    def __len__(self) -> int:
        return int(self.manifest["documents"])

    def __iter__(self) -> Iterator[tuple[str, str]]:
        for batch in self.iter_batches():
            yield from zip(batch.texts, batch.sources, strict=True)

    @property
    def num_shards(self) -> int:
        """How many shards there are. They can be read independently, in one process each."""
        return len(self.manifest["shards"])

    @property
    def holds(self) -> Kind:
        """What its documents are."""
        return next(kind for kind, schema in SCHEMAS.items() if schema.names == self.manifest["columns"])

    def iter_batches(self, batch_documents: int = 1024) -> Iterator[CorpusBatch]:
        """All documents in order, at most `batch_documents` at a time.

        Raises:
            UserError: it holds no texts; a shard is damaged: which, what was expected, what came.
        """
        for index in range(self.num_shards):
            yield from self.iter_shard(index, batch_documents)

    def iter_shard(self, index: int, batch_documents: int = 1024) -> Iterator[CorpusBatch]:
        """The documents of shard `index` (from 0) in order. Raises UserError as `iter_batches` does."""
        if self.holds != "texts":
            raise UserError(
                f"{self.folder}",
                "must be a corpus of texts here",
                got=f"one of {self.holds}",
                remedy="`lumi tokenize` and `lumi tokenizer` take it,"
                " or prepare sources without `conversation`",
            )
        for documents, sources in self._read_shard(index, batch_documents):
            yield CorpusBatch(documents, sources)

    def iter_conversations(self, batch_documents: int = 1024) -> Iterator[ConversationBatch]:
        """All conversations in order, at most `batch_documents` at a time.

        Raises:
            UserError: it holds no conversations; a shard is damaged: which, what was expected, what came.
        """
        if self.holds != "conversations":
            raise UserError(
                f"{self.folder}",
                "must be a corpus of conversations here",
                got=f"one of {self.holds}",
                remedy="prepare sources that have a `conversation`, such as configs/corpus/chat.json",
            )
        for documents, sources in self.iter_documents(batch_documents):
            yield ConversationBatch(documents, sources)

    def iter_documents(self, batch_documents: int = 1024) -> Iterator[tuple[list[Any], list[str]]]:
        """All documents in order, of whatever kind, and their sources; at most `batch_documents` at a time.

        Raises:
            UserError: a shard is damaged: which, what was expected, what came.
        """
        for index in range(self.num_shards):
            yield from self._read_shard(index, batch_documents)

    def iter_texts(self, batch_documents: int = 1024) -> Iterator[str]:
        """The text of every document in order: the contents of messages have a line end between them.

        Raises:
            UserError: a shard is damaged: which, what was expected, what came.
        """
        for documents, _ in self.iter_documents(batch_documents):
            yield from map(text_of, documents)

    def _read_shard(self, index: int, batch_documents: int) -> Iterator[tuple[list[Any], list[str]]]:
        if batch_documents < 1:
            raise ValueError(f"batch_documents must be at least 1, got {batch_documents}")
        shard, kind = self.manifest["shards"][index], self.holds
        _check_shard(self.folder, shard, read=True)
        with pq.ParquetFile(self.folder / shard["file"]) as file:
            for batch in file.iter_batches(batch_size=batch_documents, columns=self.manifest["columns"]):
                *parts, sources = (column.to_pylist() for column in batch.columns)
                yield [_from_row(row, kind) for row in zip(*parts, strict=True)], sources

    def verify(self) -> None:
        """Read every shard and compare its SHA-256. Raises UserError as `iter_batches` does."""
        for shard in self.manifest["shards"]:
            _check_shard(self.folder, shard, read=True)


def read_corpus(folder: str | Path) -> CorpusReader:
    """Open a corpus folder that `lumi prepare` wrote.

    Raises:
        UserError: it is not one, it is not finished, or a shard is missing or has another size.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest is None:
        got = "a file" if folder.exists() else "nothing"
        if folder.is_dir():
            got = "a folder without the manifest.json of a corpus"
        raise UserError(
            f"{folder}", "must be a corpus folder", got=got, remedy=f"make one: {MAKE_ONE} {folder}"
        )
    for shard in manifest["shards"]:
        _check_shard(folder, shard, read=False)
    return CorpusReader(folder, manifest)


def is_corpus(folder: str | Path) -> bool:
    """Whether a folder holds a finished corpus; its shards are not checked."""
    return read_manifest(Path(folder)) is not None


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a corpus, or None if the folder holds none, or that of another stage.

    Raises:
        UserError: the manifest is damaged, or was written by a later version of Lumi.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        return None
    manifest = read_json(path)
    if not isinstance(manifest, dict) or manifest.get("kind") != KIND:
        return None
    if manifest.get("format") != FORMAT:
        raise UserError(
            f"{path}: format",
            f"must be {FORMAT}",
            got=manifest.get("format"),
            remedy="make the corpus again with this version of lumi",
        )
    remake = f"make the corpus again: {MAKE_ONE} {folder}"
    shards = manifest.get("shards")
    if not isinstance(manifest.get("documents"), int) or not isinstance(shards, list):
        raise UserError(f"{path}:", "must hold documents and shards", remedy=f"the file is damaged, {remake}")
    if manifest.get("columns") not in [schema.names for schema in SCHEMAS.values()]:
        expected = " or ".join(", ".join(schema.names) for schema in SCHEMAS.values())
        raise UserError(f"{path}: columns", f"must be {expected}", got=manifest.get("columns"), remedy=remake)
    if not all(map(_is_shard, shards)):
        raise UserError(
            f"{path}: shards", f"must hold {', '.join(SHARD_KEYS)}", remedy=f"the file is damaged, {remake}"
        )
    return manifest


def _is_shard(shard: Any) -> bool:
    if not isinstance(shard, dict) or not set(SHARD_KEYS) <= shard.keys():
        return False
    return Path(str(shard["file"])).name == shard["file"]  # a name with a folder in it could point anywhere


class CorpusWriter:
    """A context that writes shards beside their final place; `commit` moves all of them there.

    The same documents give the same files: the bytes of text alone decide where shards and row groups end.
    """

    def __init__(self, folder: Path, shard_bytes: int, kind: Kind = "texts") -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.schema = SCHEMAS[kind]
        self.shards: list[dict[str, Any]] = []
        self._building = folder / ".building"
        self._documents: list[Document] = []
        self._sources: list[str] = []
        self._group_bytes = self._file_bytes = self._file_documents = 0
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> "CorpusWriter":
        shutil.rmtree(self._building, ignore_errors=True)
        self._building.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self._building, ignore_errors=True)

    def add(self, document: Document, source: str, num_bytes: int) -> None:
        """Append a document whose text has `num_bytes` bytes of UTF-8."""
        self._documents.append(document)
        self._sources.append(source)
        self._group_bytes += num_bytes
        if self._group_bytes >= min(ROW_GROUP_BYTES, self.shard_bytes - self._file_bytes):
            self._flush()
        if self._file_bytes >= self.shard_bytes:
            self._close()

    def commit(self, manifest: Manifest, card: str) -> Manifest:
        """Move shards and card into the folder, then the manifest; then delete an earlier corpus's shards."""
        self._flush()
        self._close()
        manifest = {
            "kind": KIND,
            "format": FORMAT,
            **manifest,
            "columns": self.schema.names,
            "shards": self.shards,
        }
        for shard in self.shards:
            os.replace(self._building / shard["file"], self.folder / shard["file"])
        temporary = self._building / "DATA_CARD.md"
        temporary.write_text(card, encoding="utf-8")
        os.replace(temporary, self.folder / "DATA_CARD.md")
        write_json(self.folder / "manifest.json", manifest)
        names = {shard["file"] for shard in self.shards}
        for path in self.folder.glob("shard-*-????????.parquet"):
            if path.name not in names:
                path.unlink()
        return manifest

    def _flush(self) -> None:
        if not self._documents:
            return
        if self._file is None:
            self._file = pq.ParquetWriter(self._building / "shard.parquet", self.schema, compression="zstd")
        columns = list(zip(*map(_to_row, self._documents), strict=True))
        self._file.write_table(pa.table([*map(list, columns), self._sources], schema=self.schema))
        self._file_bytes += self._group_bytes
        self._file_documents += len(self._documents)
        self._documents, self._sources, self._group_bytes = [], [], 0

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        path = self._building / "shard.parquet"
        digest = sha256_file(path)
        # The hash in the name keeps the shards of an earlier corpus whole until the new manifest is in place.
        name = f"shard-{len(self.shards):05d}-{digest[:8]}.parquet"
        self.shards.append(
            {"file": name, "documents": self._file_documents, "bytes": path.stat().st_size, "sha256": digest}
        )
        os.replace(path, self._building / name)
        self._file_bytes = self._file_documents = 0


def _to_row(document: Document) -> tuple[Any, ...]:
    """The values of a document's columns."""
    plain = to_plain(document)
    return tuple(plain.values()) if isinstance(document, Pair) else (plain,)


def _from_row(row: tuple[Any, ...], kind: Kind) -> Document:
    return from_plain(dict(zip(Pair._fields, row, strict=True)) if kind == "pairs" else row[0], kind)


def _check_shard(folder: Path, shard: dict[str, Any], *, read: bool) -> None:
    path = folder / shard["file"]
    expected, got = f"{shard['bytes']} bytes", "no file"
    if path.is_file():
        got = f"{path.stat().st_size} bytes"
        if got == expected and read:
            expected, got = f"SHA-256 {shard['sha256']}", f"SHA-256 {sha256_file(path)}"
    if got != expected:
        raise UserError(
            f"{path}",
            f"must have {expected}",
            got=got,
            remedy="the shard is damaged: copy it again from where it came,"
            f" or make it again: {MAKE_ONE} {folder} --use-cache",
        )
