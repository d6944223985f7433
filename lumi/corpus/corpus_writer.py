"""Writes the corpus folder: whole or not at all."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pyarrow as pa
import pyarrow.parquet as pq

from lumi.chat.pairs import Pair
from lumi.config import write_json
from lumi.corpus.documents import Attribution, Document, Kind, messages_of, to_plain
from lumi.corpus.folder import FORMAT, KIND, SCHEMAS, WITH_REASONING, Manifest, attributed
from lumi.host.storage import sha256_file

ROW_GROUP_BYTES = 8 << 20  # of text; what a reader holds in memory


class ShardLayout:
    """Where row groups and shards end: it follows from the bytes of text of the documents."""

    def __init__(self, shard_bytes: int) -> None:
        self.shard_bytes = shard_bytes
        self._group_bytes = self._shard_bytes = 0

    def add(self, num_bytes: int) -> Literal["", "group", "shard"]:
        """What ends behind a document whose text has `num_bytes` bytes of UTF-8; a shard ends its group."""
        self._group_bytes += num_bytes
        if self._group_bytes < min(ROW_GROUP_BYTES, self.shard_bytes - self._shard_bytes):
            return ""
        self._shard_bytes += self._group_bytes
        self._group_bytes = 0
        if self._shard_bytes < self.shard_bytes:
            return "group"
        self._shard_bytes = 0
        return "shard"

    def begin_shard(self) -> None:
        """The next document begins a shard."""
        self._group_bytes = self._shard_bytes = 0


class CorpusWriter:
    """A context that writes shards beside their final place; `commit` moves all of them there.

    The same documents give the same files, by `ShardLayout`. The first reasoning in a corpus also begins a
    shard, and all shards then have the column of it.

    Args:
        folder: where the corpus goes.
        shard_bytes: of text in a shard.
        kind: what the documents are.
        first_shard: the number of the first shard.
        with_reasoning: a document of an earlier shard has reasoning.
        columns: those of an `Attribution` that the shards have.
    """

    def __init__(
        self,
        folder: Path,
        shard_bytes: int,
        kind: Kind = "texts",
        *,
        first_shard: int = 0,
        with_reasoning: bool = False,
        columns: Sequence[str] = (),
    ) -> None:
        self.folder, self.building = folder, folder / ".building"
        self._columns = columns
        self._with_reasoning = attributed(WITH_REASONING[kind], columns)
        self.schema = self._with_reasoning if with_reasoning else attributed(SCHEMAS[kind], columns)
        self.shards: list[dict[str, Any]] = []
        self._first_shard = first_shard
        self._layout = ShardLayout(shard_bytes)
        self._rows: list[tuple[Any, ...]] = []
        self._file_documents = 0
        self._file: pq.ParquetWriter | None = None

    def __enter__(self) -> "CorpusWriter":
        shutil.rmtree(self.building, ignore_errors=True)
        self.building.mkdir(parents=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()
        shutil.rmtree(self.building, ignore_errors=True)

    def add(
        self, document: Document, source: str, num_bytes: int, attribution: Attribution | None = None
    ) -> None:
        """Append a document whose text has `num_bytes` bytes of UTF-8."""
        if self.schema is not self._with_reasoning and has_reasoning(document):
            self._flush()
            self._close()
            self._layout.begin_shard()
            self.schema = self._with_reasoning
        labels = (getattr(attribution, name, None) or None for name in self._columns)
        self._rows.append((*_to_row(document), source, *labels))
        end = self._layout.add(num_bytes)
        if end:
            self._flush()
        if end == "shard":
            self._close()

    def finish(self, *, with_reasoning: bool = False) -> list[dict[str, Any]]:
        """End the last shard; the entries of all shards. They lie in `building`.

        Args:
            with_reasoning: a document of a later shard has reasoning.
        """
        self._flush()
        self._close()
        if with_reasoning or self.schema is self._with_reasoning:
            self.schema = self._with_reasoning
            self.shards = [self._widen(shard) for shard in self.shards]
        return self.shards

    def commit(self, manifest: Manifest, pages: Mapping[str, str]) -> Manifest:
        """Move shards and pages into the folder, then the manifest; an earlier corpus goes."""
        return publish(self.folder, self.building, self.finish(), self.schema, manifest, pages)

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._file is None:
            self._file = self._open()
        columns = list(map(list, zip(*self._rows, strict=True)))
        self._file.write_table(pa.table(columns, schema=self.schema))
        self._file_documents += len(self._rows)
        self._rows = []

    def _open(self) -> pq.ParquetWriter:
        return pq.ParquetWriter(self.building / "shard.parquet", self.schema, compression="zstd")

    def _close(self) -> None:
        if self._file is None:
            return
        self._file.close()
        self._file = None
        self.shards.append(self._seal(len(self.shards), self._file_documents))
        self._file_documents = 0

    def _seal(self, index: int, num_documents: int) -> dict[str, Any]:
        """Name the shard that was written; its entry in the manifest."""
        path = self.building / "shard.parquet"
        digest = sha256_file(path)
        # The hash in the name keeps the shards of an earlier corpus whole until the new manifest is in place.
        name = f"shard-{self._first_shard + index:05d}-{digest[:8]}.parquet"
        size = path.stat().st_size
        os.replace(path, self.building / name)
        return {"file": name, "documents": num_documents, "bytes": size, "sha256": digest}

    def _widen(self, shard: dict[str, Any]) -> dict[str, Any]:
        """Give a shard from before the first reasoning the column of it."""
        old = self.building / shard["file"]
        with pq.ParquetFile(old) as file:
            if file.schema_arrow.equals(self.schema):
                return shard
            with self._open() as writer:
                for group in range(file.num_row_groups):
                    writer.write_table(file.read_row_group(group).cast(self.schema))
        old.unlink()
        return self._seal(self.shards.index(shard), shard["documents"])


def publish(
    folder: Path,
    building: Path,
    shards: list[dict[str, Any]],
    schema: pa.Schema,
    manifest: Manifest,
    pages: Mapping[str, str],
) -> Manifest:
    """Move shards and pages into the folder, then the manifest; then delete an earlier corpus's shards.

    Args:
        building: where the shards lie. Those that an interrupted call has moved are in `folder` already.
        schema: of the shards.
        manifest: without shards.
        pages: files for people: name -> text.

    Returns:
        The whole manifest.
    """
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        **manifest,
        "columns": schema.names,
        "shards": shards,
    }
    for shard in shards:
        if (building / shard["file"]).exists():
            os.replace(building / shard["file"], folder / shard["file"])
    for name, text in pages.items():
        (building / name).write_bytes(text.encode("utf-8", "replace"))
        os.replace(building / name, folder / name)
    write_json(folder / "manifest.json", manifest)
    names = {shard["file"] for shard in shards}
    for path in folder.glob("shard-*-????????.parquet"):
        if path.name not in names:
            path.unlink()
    return manifest


def has_reasoning(document: Document) -> bool:
    """Whether a message of a document holds reasoning."""
    return not isinstance(document, str) and any(message.reasoning for message in messages_of(document))


def _to_row(document: Document) -> tuple[Any, ...]:
    """The values of a document's columns."""
    plain = to_plain(document)
    return tuple(plain.values()) if isinstance(document, Pair) else (plain,)
