"""A token store behind a URL, read as if it lay on this machine.

The manifest comes first, in every process and each time. Offsets and loss masks come whole. Tokens come in
blocks, when they are asked for, into a cache of a bounded size. `<split>.blocks` has the SHA-256 of each
block, so none is used that is not what was written: it is fetched again, also where the cache is damaged.
"""

import hashlib
import sys
import threading
from dataclasses import asdict
from pathlib import Path

import numpy as np

from lumi.config import UserError, write_text
from lumi.data.block_cache import BlockCache
from lumi.data.store_manifest import (
    BLOCK_BYTES,
    MANIFEST_FILE,
    STORE,
    TOKENIZE_COMMAND,
    FileRecord,
    StoreManifest,
    read_store_manifest,
)
from lumi.data.stored_array import FlatArray, StoredArray
from lumi.data.token_store import TokenStore
from lumi.host.provenance import write_provenance
from lumi.host.remote import RemoteFolder
from lumi.host.storage import DamagedError, check_file, file_record, make_folder
from lumi.host.user_cache import URL_FILE, home_of

_LOCKS = 64  # two threads that want the same block wait for one of them to fetch it


def open_remote_store(
    url: str,
    *,
    tokenizer_fingerprint: str | None = None,
    vocab_size: int | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int,
    quiet: bool = False,
) -> TokenStore:
    """Open the token store behind a URL; its folder is the place in the cache of what comes whole.

    Args:
        url: of a folder that `lumi tokenize` made and somebody copied.
        tokenizer_fingerprint, vocab_size: as in `TokenStore.open`.
        cache_dir: None: the user's cache folder.
        cache_bytes: that the blocks of tokens in that folder may take, those of other stores too.
        quiet: say nothing of a cache that is too small for the store.

    Raises:
        UserError: as `TokenStore.open`; a file cannot be fetched; the store has no hashes of blocks.
    """
    remote, home = RemoteFolder(url), home_of(url, cache_dir)
    make_folder(home)
    write_text(home / URL_FILE, remote.url)
    remote.fetch(MANIFEST_FILE, home / MANIFEST_FILE)
    cache = BlockCache(home.parent / "blocks", cache_bytes)
    try:
        manifest = read_store_manifest(home)
        store = TokenStore.open(
            home,
            tokenizer_fingerprint=tokenizer_fingerprint,
            vocab_size=vocab_size,
            verify="size",
            open_file=_RemoteFiles(remote, manifest, cache).open,
        )
    except UserError as error:
        raise error if error.subject.startswith(remote.url) else error.within(remote.url) from error
    whole = {name: file for name, file in manifest.files.items() if not name.endswith(".tokens")}
    write_provenance(home, STORE, None, whole | {MANIFEST_FILE: file_record(home / MANIFEST_FILE)})
    size = sum(file["size"] for name, file in manifest.files.items() if name.endswith(".tokens"))
    if size > cache_bytes and not quiet:
        too_small = f"its {size / 1e9:.2g} GB of tokens are more than the cache's {cache_bytes / 1e9:.2g} GB"
        print(f"{remote.url}: {too_small}; blocks will be fetched again and again", file=sys.stderr)
    return store


class _RemoteFiles:
    def __init__(self, remote: RemoteFolder, manifest: StoreManifest, cache: BlockCache) -> None:
        self._remote, self._manifest, self._cache = remote, manifest, cache

    def open(self, path: Path, file: FileRecord, dtype: np.dtype, length: int, remedy: str) -> FlatArray:
        """The array in a file of the store."""
        if path.suffix != ".tokens":
            self._bring(path, file)
            return StoredArray(path, dtype, length, remedy=remedy)
        hashes = path.with_suffix(".blocks")
        record = self._manifest.splits[path.stem].blocks
        if record is None:
            raise UserError(
                f"{self._remote.url}:",
                f"must hold {hashes.name}, the hashes of its blocks",
                got="a token store of an earlier version of lumi",
                remedy=f"make it again with `{TOKENIZE_COMMAND} STORE`",
            )
        self._bring(hashes, record)
        return RemoteArray(self._remote, path.name, file, hashes.read_bytes(), dtype, length, self._cache)

    def _bring(self, path: Path, file: FileRecord) -> None:
        """Fetch a whole file, unless it is here. An earlier store of the URL may have left another one."""
        record = asdict(file)
        try:
            check_file(path, record, remedy="")
        except DamagedError:
            self._remote.fetch(path.name, path, lambda copy: check_file(copy, record, remedy=""))


class RemoteArray(FlatArray):
    """An array in a file behind a URL, in blocks of BLOCK_BYTES that a cache keeps.

    Args:
        remote, name, file: where it lies, and its size and hash.
        hashes: the SHA-256 of each block, one after another.
        dtype, length: type and number of its values.
    """

    def __init__(
        self,
        remote: RemoteFolder,
        name: str,
        file: FileRecord,
        hashes: bytes,
        dtype: np.dtype,
        length: int,
        cache: BlockCache,
    ) -> None:
        super().__init__(dtype, length)
        self.remote, self.name, self.file, self.hashes, self.cache = remote, name, file, hashes, cache
        self._checked: set[int] = set()  # blocks in the cache that this process has compared
        self._locks = [threading.Lock() for _ in range(_LOCKS)]

    def _read(self, offset: int, size: int) -> bytes:
        if size == 0:
            return b""
        first, last = offset // BLOCK_BYTES, (offset + size - 1) // BLOCK_BYTES
        pieces = []
        for number in range(first, last + 1):
            begin = number * BLOCK_BYTES
            pieces.append(
                self._piece(number, max(0, offset - begin), min(BLOCK_BYTES, offset + size - begin))
            )
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _piece(self, number: int, start: int, stop: int) -> bytes:
        """The bytes [start, stop) of a block."""
        key = self.file.sha256[:16]
        if number in self._checked:
            piece = self.cache.read(key, number, start, stop)
            if piece is not None and len(piece) == stop - start:
                return piece
        with self._locks[number % _LOCKS]:
            block = self.cache.read(key, number)
            if block is None or not self._is_whole(number, block):
                block = self._fetch(number)
                self.cache.add(key, number, block)
            self._checked.add(number)
        return block[start:stop]

    def _fetch(self, number: int) -> bytes:
        begin = number * BLOCK_BYTES
        end = min(begin + BLOCK_BYTES, self.file.size)

        def check(block: bytes) -> None:
            if not self._is_whole(number, block):
                place = f"{self.remote.url}/{self.name}, bytes {begin} to {end}:"
                raise UserError(place, "must have the SHA-256 in its .blocks", got="others")

        return self.remote.read(self.name, begin, end, check)

    def _is_whole(self, number: int, block: bytes) -> bool:
        return hashlib.sha256(block).digest() == self.hashes[32 * number : 32 * (number + 1)]
