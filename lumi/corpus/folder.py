"""The corpus folder: Parquet shards and `manifest.json`, verified when read. `corpus_writer` writes it.

A corpus holds texts, conversations or pairs. Its columns are `text`, or `messages`, or `prompt`, `chosen` and
`rejected`; and `source`. Where a source names fields for them, there are `license` and `url`, which may be
null.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.messages import Conversation
from lumi.chat.pairs import Pair
from lumi.config import UserError, read_json
from lumi.corpus.documents import Attribution, Document, Kind, from_plain, text_of
from lumi.host.provenance import Parent
from lumi.host.storage import sha256_file

KIND = "lumi-corpus"
FORMAT = 1
MAKE_ONE = "lumi prepare --config CONFIG --output-dir"
SHARD_KEYS = ("bytes", "documents", "file", "sha256")


def _schemas(*message_fields: str) -> dict[Kind, pa.Schema]:
    messages = pa.list_(pa.struct([(name, pa.string()) for name in message_fields]))
    columns: dict[Kind, dict[str, pa.DataType]] = {
        "texts": {"text": pa.string()},
        "conversations": {"messages": messages},
        "pairs": dict.fromkeys(Pair._fields, messages),
    }
    return {kind: pa.schema([*own.items(), ("source", pa.string())]) for kind, own in columns.items()}


# Messages, and pairs, as the libraries of the hub read and write them, with reasoning if there is some.
SCHEMAS = _schemas("role", "content")
WITH_REASONING = _schemas("role", "content", "reasoning_content")

Manifest = dict[str, Any]


def attributed(schema: pa.Schema, columns: Iterable[str]) -> pa.Schema:
    """The schema of shards that also have these columns of an `Attribution`."""
    return pa.schema([*schema, *((name, pa.string()) for name in columns)])


def own_columns(columns: Sequence[str]) -> list[str]:
    """The columns of a corpus without those of an `Attribution`."""
    return [name for name in columns if name not in Attribution._fields]


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
    def fingerprint(self) -> str:
        """SHA-256 of the hashes of the shards. It identifies the documents, however they were made."""
        hashes = "".join(shard["sha256"] for shard in self.manifest["shards"])
        return hashlib.sha256(hashes.encode()).hexdigest()

    @property
    def as_parent(self) -> Parent:
        """The corpus as what something is made from."""
        return Parent("corpus", self.folder, self.fingerprint)

    @property
    def holds(self) -> Kind:
        """What its documents are."""
        columns = own_columns(self.manifest["columns"])
        return next(kind for kind, schema in SCHEMAS.items() if schema.names == columns)

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
        for documents, sources in self.iter_documents_of(index, batch_documents):
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
            yield from self.iter_documents_of(index, batch_documents)

    def iter_texts(self, batch_documents: int = 1024) -> Iterator[str]:
        """The text of every document in order: what messages say has a line end between.

        Raises:
            UserError: a shard is damaged: which, what was expected, what came.
        """
        for documents, _ in self.iter_documents(batch_documents):
            yield from map(text_of, documents)

    def iter_documents_of(
        self, index: int, batch_documents: int = 1024
    ) -> Iterator[tuple[list[Any], list[str]]]:
        """Those of shard `index` (from 0), as `iter_documents` gives all."""
        if batch_documents < 1:
            raise ValueError(f"batch_documents must be at least 1, got {batch_documents}")
        shard, kind = self.manifest["shards"][index], self.holds
        _check_shard(self.folder, shard, read=True)
        with pq.ParquetFile(self.folder / shard["file"]) as file:
            for batch in file.iter_batches(
                batch_size=batch_documents, columns=own_columns(self.manifest["columns"])
            ):
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
    columns = manifest.get("columns")
    if not isinstance(columns, list) or own_columns(columns) not in [each.names for each in SCHEMAS.values()]:
        expected = " or ".join(", ".join(schema.names) for schema in SCHEMAS.values())
        raise UserError(f"{path}: columns", f"must be {expected}", got=columns, remedy=remake)
    if not all(map(_is_shard, shards)):
        raise UserError(
            f"{path}: shards", f"must hold {', '.join(SHARD_KEYS)}", remedy=f"the file is damaged, {remake}"
        )
    return manifest


def _is_shard(shard: Any) -> bool:
    if not isinstance(shard, dict) or not set(SHARD_KEYS) <= shard.keys():
        return False
    return Path(str(shard["file"])).name == shard["file"]  # a name with a folder in it could point anywhere


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
