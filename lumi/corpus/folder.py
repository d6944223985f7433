"""The corpus folder: Parquet shards and `manifest.json`, verified when read. `corpus_writer` writes it.

A corpus holds texts or conversations: its first column is `text` or `messages`, its second is `source`.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.messages import Conversation, contents, from_json
from lumi.config import UserError, read_json
from lumi.host.storage import sha256_file

KIND = "lumi-corpus"
FORMAT = 1
TEXTS = pa.schema([("text", pa.string()), ("source", pa.string())])
# The column of conversations as the libraries of the hub read and write it, with reasoning if there is some.
_MESSAGE = [("role", pa.string()), ("content", pa.string())]
CONVERSATIONS, WITH_REASONING = (
    pa.schema([("messages", pa.list_(pa.struct(message))), ("source", pa.string())])
    for message in (_MESSAGE, [*_MESSAGE, ("reasoning_content", pa.string())])
)
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
    those of a corpus of conversations, and `iter_texts` the text of either.
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
    def holds_conversations(self) -> bool:
        """Whether its documents are conversations, not texts."""
        return "messages" in self.manifest["columns"]

    def iter_batches(self, batch_documents: int = 1024) -> Iterator[CorpusBatch]:
        """All documents in order, at most `batch_documents` at a time.

        Raises:
            UserError: it holds conversations; a shard is damaged: which, what was expected, what came.
        """
        for index in range(self.num_shards):
            yield from self.iter_shard(index, batch_documents)

    def iter_shard(self, index: int, batch_documents: int = 1024) -> Iterator[CorpusBatch]:
        """The documents of shard `index` (from 0) in order. Raises UserError as `iter_batches` does."""
        if self.holds_conversations:
            raise UserError(
                f"{self.folder}",
                "must be a corpus of texts here",
                got="one of conversations",
                remedy="`lumi tokenize` and `lumi tokenizer` take it,"
                " or prepare sources without `conversation`",
            )
        for documents, sources in self._read_shard(index, batch_documents):
            yield CorpusBatch(documents, sources)

    def iter_conversations(self, batch_documents: int = 1024) -> Iterator[ConversationBatch]:
        """All conversations in order, at most `batch_documents` at a time.

        Raises:
            UserError: it holds texts; a shard is damaged: which, what was expected, what came.
        """
        if not self.holds_conversations:
            raise UserError(
                f"{self.folder}",
                "must be a corpus of conversations here",
                got="one of texts",
                remedy="prepare sources that have a `conversation`, such as configs/corpus/chat.json",
            )
        for index in range(self.num_shards):
            for documents, sources in self._read_shard(index, batch_documents):
                yield ConversationBatch([from_json(messages) for messages in documents], sources)

    def iter_texts(self, batch_documents: int = 1024) -> Iterator[str]:
        """The text of every document in order: of a conversation its contents, a line end between messages.

        Raises:
            UserError: a shard is damaged: which, what was expected, what came.
        """
        if not self.holds_conversations:
            for batch in self.iter_batches(batch_documents):
                yield from batch.texts
            return
        for conversations, _ in self.iter_conversations(batch_documents):
            yield from map(contents, conversations)

    def _read_shard(self, index: int, batch_documents: int) -> Iterator[tuple[list[Any], list[str]]]:
        if batch_documents < 1:
            raise ValueError(f"batch_documents must be at least 1, got {batch_documents}")
        shard = self.manifest["shards"][index]
        _check_shard(self.folder, shard, read=True)
        with pq.ParquetFile(self.folder / shard["file"]) as file:
            for batch in file.iter_batches(batch_size=batch_documents, columns=self.manifest["columns"]):
                yield batch.column(0).to_pylist(), batch.column(1).to_pylist()

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
    if manifest.get("columns") not in (TEXTS.names, CONVERSATIONS.names):
        expected = " or ".join(", ".join(schema.names) for schema in (TEXTS, CONVERSATIONS))
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
