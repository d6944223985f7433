"""Reading a token store: per split one flat array of tokens, document offsets and perhaps a loss mask.

A document is a text (BOS, its ids, EOS) or a conversation in a chat template; two that follow each other may
be a pair. All files are little-endian:
- `<split>.tokens`: uint16, or uint32 past 65,536 ids.
- `<split>.offsets`: uint64, where each document begins in the tokens, and last the number of tokens.
- `<split>.mask`: one bit per token, the first in the highest bit of the first byte. Absent where every token
  is trained.
- `<split>.blocks`: the SHA-256 of each MiB of the tokens, for those who do not read all of them.
- `manifest.json`, written last.

The store knows no sequence length: `lumi.data.rows` cuts or packs the documents.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from lumi.config import UserError
from lumi.data.store_manifest import (
    MANIFEST_FILE,
    STORE,
    TOKENIZE_COMMAND,
    FileRecord,
    SplitManifest,
    StoreManifest,
    read_store_manifest,
    token_dtype,
)
from lumi.data.stored_array import FlatArray, StoredArray
from lumi.host.provenance import Parent
from lumi.host.storage import check_file

_CHECK_TOKENS = 1 << 24  # read at a time for the largest id

OpenFile = Callable[[Path, FileRecord, np.dtype, int, str], FlatArray]


@dataclass
class Split:
    """One split of a token store.

    Attributes:
        tokens: (num_tokens,) uint16 or uint32; a FlatArray reads `tokens[start:stop]` when it is asked for.
        offsets: (num_documents + 1,) uint64, where each document begins in `tokens`.
        mask: (ceil(num_tokens / 8),) uint8, the packed loss mask; None where every token is trained.
        num_bytes: UTF-8 bytes of the trained text.
        pairs: whether documents 2i and 2i + 1 are the chosen and the rejected conversation of a pair.
    """

    tokens: np.ndarray | FlatArray
    offsets: np.ndarray
    mask: np.ndarray | None
    num_bytes: int
    pairs: bool = False

    @property
    def num_documents(self) -> int:
        """Documents in the split."""
        return len(self.offsets) - 1

    @property
    def num_tokens(self) -> int:
        """Tokens in the split, BOS and EOS included."""
        return len(self.tokens)

    def document(self, index: int) -> np.ndarray:
        """The tokens of document `index`, BOS and EOS included."""
        return self.tokens[int(self.offsets[index]) : int(self.offsets[index + 1])]

    def loss_mask(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool: which of the tokens [start, stop) are trained."""
        if self.mask is None:
            return np.ones(stop - start, dtype=bool)
        first = start // 8
        bits = np.unpackbits(self.mask[first : -(-stop // 8)])
        return bits[start - 8 * first : stop - 8 * first].astype(bool)


class TokenStore:
    """A finished token store: `folder`, `manifest`, and `splits` by name."""

    def __init__(self, folder: Path, manifest: StoreManifest, splits: dict[str, Split]) -> None:
        self.folder, self.manifest, self.splits = folder, manifest, splits

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        verify: Literal["size", "hash"] = "hash",
        open_file: OpenFile | None = None,
    ) -> "TokenStore":
        """Open a token store and check that its files are what was written.

        Args:
            folder: made by `lumi tokenize`.
            tokenizer_fingerprint, vocab_size: of the tokenizer that must have made the ids. None accepts any.
            verify: "hash" reads every byte once, for its SHA-256 and the largest id (about 1 s per GB).
                "size" trusts the content of files of the right size. In a run, "hash" in one process is
                enough.
            open_file: (path, record, dtype, length, remedy) -> the array of a file that does not lie in
                `folder`. None: all of them do.

        Raises:
            UserError: no token store; another tokenizer; a file that is missing, truncated or corrupt; ids
                outside the vocabulary.
        """
        folder = Path(folder)
        manifest = read_store_manifest(folder)
        theirs = manifest.tokenizer_fingerprint
        if tokenizer_fingerprint is not None and theirs != tokenizer_fingerprint:
            raise UserError(
                f"{folder}:",
                f"must be made with the tokenizer of fingerprint {tokenizer_fingerprint}",
                got=f"a token store of {theirs}",
                remedy="give that tokenizer, or tokenize into another folder with "
                f"`{TOKENIZE_COMMAND} STORE`",
            )
        num_ids = manifest.vocab_size if vocab_size is None else min(vocab_size, manifest.vocab_size)
        splits = {
            name: _open_split(folder, name, manifest, num_ids, verify == "hash", open_file)
            for name in manifest.splits
        }
        return cls(folder, manifest, splits)

    @property
    def as_parent(self) -> Parent:
        """The store as what something is made from."""
        return Parent(STORE, self.folder, self.manifest.fingerprint)

    def has_split(self, name: str) -> bool:
        """Whether the store has the split "train" or "validation"."""
        return name in self.splits

    def split(self, name: str) -> Split:
        """The split "train" or "validation". Raises UserError if the store has none of that name."""
        if name not in self.splits:
            raise UserError(
                f"{self.folder}:",
                f"must hold the split {name!r}",
                got=", ".join(self.splits),
                remedy=f"make one with `{TOKENIZE_COMMAND} STORE --validation-fraction FRACTION`",
            )
        return self.splits[name]


def _open_split(
    folder: Path,
    name: str,
    manifest: StoreManifest,
    num_ids: int,
    check_content: bool,
    open_file: OpenFile | None,
) -> Split:
    record = manifest.splits[name]
    remedy = f"copy the store again, or remove it and run `{TOKENIZE_COMMAND} {folder}`"
    if open_file is None:

        def open_file(path: Path, file: FileRecord, dtype: np.dtype, length: int, remedy: str) -> FlatArray:
            check_file(path, asdict(file), remedy=remedy, check_hash=check_content)
            return StoredArray(path, dtype, length, remedy=remedy)

    arrays = _open_arrays(folder, name, record, token_dtype(manifest.vocab_size), remedy, open_file)
    tokens, offsets = arrays["tokens"], arrays["offsets"][:]
    if offsets[0] != 0 or offsets[-1] != record.tokens or (offsets[1:] <= offsets[:-1]).any():
        raise UserError(
            f"{folder / name}.offsets:",
            f"must rise from 0 to {record.tokens}",
            got="other values: the file is corrupt",
            remedy=remedy,
        )
    highest = _highest_id(tokens) if check_content else record.max_token_id
    if highest >= num_ids:
        raise UserError(
            f"{folder / name}.tokens: ids", f"must be below {num_ids}", got=highest, remedy=remedy
        )
    mask = arrays["mask"][:] if "mask" in arrays else None
    return Split(tokens, offsets, mask, num_bytes=record.bytes, pairs=manifest.pairs)


def _open_arrays(
    folder: Path, name: str, record: SplitManifest, dtype: np.dtype, remedy: str, open_file: OpenFile
) -> dict[str, FlatArray]:
    """Check the files of a split; returns the arrays "tokens", "offsets" and perhaps "mask"."""
    arrays: dict[str, FlatArray] = {}
    for kind, array_dtype, length in (
        ("tokens", dtype, record.tokens),
        ("offsets", np.dtype("<u8"), record.documents + 1),
        ("mask", np.dtype("u1"), -(-record.tokens // 8)),
    ):
        path, size = folder / f"{name}.{kind}", length * array_dtype.itemsize
        file = record.files.get(path.name)
        if file is None:
            continue
        if file.size != size or file.size == 0:
            raise UserError(
                f"{folder / MANIFEST_FILE}: size of {path.name}",
                f"must be {size} for its counts",
                got=file.size,
                remedy=remedy,
            )
        arrays[kind] = open_file(path, file, array_dtype, length, remedy)
    return arrays


def _highest_id(tokens: FlatArray) -> int:
    starts = range(0, len(tokens), _CHECK_TOKENS)
    return max(int(tokens[start : start + _CHECK_TOKENS].max()) for start in starts)
