"""Writes the corpus folder: whole or not at all."""

import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.pairs import Pair
from lumi.config import write_json
from lumi.corpus.documents import Document, Kind, messages_of, to_plain
from lumi.corpus.folder import FORMAT, KIND, SCHEMAS, WITH_REASONING, Manifest
from lumi.host.storage import sha256_file

ROW_GROUP_BYTES = 8 << 20  # of text; what a reader holds in memory


class CorpusWriter:
    """A context that writes shards beside their final place; `commit` moves all of them there.

    The same documents give the same files: where shards and row groups end follows from the bytes of text.
    The first reasoning in a corpus also begins a shard, and all shards then have the column of it.
    """

    def __init__(self, folder: Path, shard_bytes: int, kind: Kind = "texts") -> None:
        self.folder, self.shard_bytes = folder, shard_bytes
        self.schema, self._with_reasoning = SCHEMAS[kind], WITH_REASONING[kind]
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
        if self.schema is not self._with_reasoning and _has_reasoning(document):
            self._flush()
            self._close()
            self.schema = self._with_reasoning
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
        if self.schema is self._with_reasoning:
            self.shards = [self._widen(shard) for shard in self.shards]
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
            self._file = self._open()
        columns = list(zip(*map(_to_row, self._documents), strict=True))
        self._file.write_table(pa.table([*map(list, columns), self._sources], schema=self.schema))
        self._file_bytes += self._group_bytes
        self._file_documents += len(self._documents)
        self._documents, self._sources, self._group_bytes = [], [], 0

    def _open(self) -> pq.ParquetWriter:
        return pq.ParquetWriter(self._building / "shard.parquet", self.schema, compression="zstd")

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.shards.append(self._seal(len(self.shards), self._file_documents))
        self._file_bytes = self._file_documents = 0

    def _seal(self, number: int, num_documents: int) -> dict[str, Any]:
        """Name the shard that was written; its entry in the manifest."""
        path = self._building / "shard.parquet"
        digest = sha256_file(path)
        # The hash in the name keeps the shards of an earlier corpus whole until the new manifest is in place.
        name = f"shard-{number:05d}-{digest[:8]}.parquet"
        size = path.stat().st_size
        os.replace(path, self._building / name)
        return {"file": name, "documents": num_documents, "bytes": size, "sha256": digest}

    def _widen(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Give a shard from before the first reasoning the column of it."""
        old = self._building / shard["file"]
        with pq.ParquetFile(old) as file:
            if file.schema_arrow.equals(self.schema):
                return shard
            with self._open() as writer:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group).cast(self.schema))
        old.unlink()
        return self._seal(self.shards.index(shard), shard["documents"])


def _has_reasoning(document: Document) -> bool:
    return not isinstance(document, str) and any(message.reasoning for message in messages_of(document))


def _to_row(document: Document) -> tuple[Any, ...]:
    """The values of a document's columns."""
    plain = to_plain(document)
    return tuple(plain.values()) if isinstance(document, Pair) else (plain,)
