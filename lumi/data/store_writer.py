"""The token store on disk, as it is written: documents are appended to splits, the manifest comes last."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import BinaryIO

import numpy as np

from lumi.config import UserError, to_dict, write_json
from lumi.data.store_manifest import (
    BLOCK_BYTES,
    MANIFEST_FILE,
    SPLITS,
    Counts,
    FileRecord,
    SplitManifest,
    StoreManifest,
    token_dtype,
)
from lumi.host.storage import file_record


class StoreWriter:
    """Appends documents to the splits of a new store. `finish` writes the manifest, which makes it a store.

    Args:
        folder: empty; best an `atomic_folder`.
        tokenizer_fingerprint, vocab_size: of the tokenizer that made the ids.
    """

    def __init__(self, folder: Path, *, tokenizer_fingerprint: str, vocab_size: int) -> None:
        self.folder, self.fingerprint, self.vocab_size = folder, tokenizer_fingerprint, vocab_size
        self.dropped: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
        self.truncated: Counter[str] = Counter()
        self._splits: dict[str, _SplitWriter] = {}

    def append(
        self,
        split: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        counts: dict[str, Counts],
        mask: np.ndarray | None = None,
    ) -> None:
        """Append documents.

        Args:
            split: "train" or "validation".
            tokens: (T,) integers below vocab_size, the documents one after another.
            lengths: (documents,) integers that add up to T, each at least 1.
            counts: what these documents are, per source.
            mask: (T,) bool, which tokens are trained. None: all; then every document of the split must come
                without one.

        Raises:
            ValueError: lengths, counts and mask do not fit the tokens.
            UserError: an id outside the vocabulary.
        """
        if len(lengths) == 0:
            return
        _check_lengths(tokens, lengths, sum(counts.values(), Counts()))
        if mask is not None and len(mask) != len(tokens):
            raise ValueError(f"mask must have one value for each of {len(tokens)} tokens, got {len(mask)}")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            got = f"{tokens.min()} to {tokens.max()}"
            raise UserError("token ids", f"must be between 0 and {self.vocab_size - 1}", got=got)
        if split not in self._splits:
            dtype = token_dtype(self.vocab_size)
            self._splits[split] = _SplitWriter(self.folder, split, dtype, has_mask=mask is not None)
        self._splits[split].append(tokens, lengths, counts, mask)

    def count_dropped(self, split: str, dropped: dict[str, int], truncated: int) -> None:
        """Add conversations that are not in the split, by reason, and the number that lost answers."""
        self.dropped[split].update(dropped)
        self.truncated[split] += truncated

    def close(self) -> None:
        """Close the files without finishing; harmless after `finish`."""
        for writer in self._splits.values():
            writer.close()

    def finish(
        self, inputs: dict[str, str], template: str | None = None, pairs: bool = False
    ) -> StoreManifest:
        """Close the files and write the manifest with these fields."""
        manifest = StoreManifest(
            tokenizer_fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            dtype="uint16" if token_dtype(self.vocab_size).itemsize == 2 else "uint32",
            inputs=inputs,
            template=template,
            pairs=pairs,
            splits={
                name: self._splits[name].finish(self.dropped[name], self.truncated[name])
                for name in sorted(self._splits)
            },
        )
        write_json(self.folder / MANIFEST_FILE, to_dict(manifest))
        return manifest


def _check_lengths(tokens: np.ndarray, lengths: np.ndarray, total: Counts) -> None:
    counted = (total.documents, total.tokens)
    if lengths.min() < 1 or counted != (len(lengths), len(tokens)) or lengths.sum() != len(tokens):
        expected = f"{len(lengths)} documents of {len(tokens)} tokens"
        got = f"a length of {lengths.min()}, a sum of {lengths.sum()}, and counts of {counted}"
        raise ValueError(f"lengths must be at least 1 and add up, as counts do, to {expected}, got {got}")


class _SplitWriter:
    def __init__(self, folder: Path, name: str, dtype: np.dtype, *, has_mask: bool) -> None:
        kinds = ("tokens", "offsets", "mask") if has_mask else ("tokens", "offsets")
        self.paths = {kind: folder / f"{name}.{kind}" for kind in kinds}
        self.files: dict[str, BinaryIO] = {kind: path.open("wb") for kind, path in self.paths.items()}
        self.dtype = dtype
        self.total = Counts()
        self.sources: dict[str, Counts] = {}
        self.max_token_id = self.trained_tokens = 0
        self.spare_bits = np.zeros(0, dtype=bool)  # fewer than 8, which do not yet fill a byte of the mask
        self.files["offsets"].write(np.zeros(1, dtype="<u8").tobytes())

    def append(
        self, tokens: np.ndarray, lengths: np.ndarray, counts: dict[str, Counts], mask: np.ndarray | None
    ) -> None:
        if (mask is not None) != ("mask" in self.files):
            raise ValueError("mask must be given for every document of a split or for none")
        self.files["tokens"].write(tokens.astype(self.dtype).tobytes())
        self.files["offsets"].write((self.total.tokens + np.cumsum(lengths)).astype("<u8").tobytes())
        if mask is not None:
            bits = np.concatenate([self.spare_bits, mask.astype(bool)])
            whole = len(bits) - len(bits) % 8
            self.files["mask"].write(np.packbits(bits[:whole]).tobytes())
            self.spare_bits = bits[whole:]
            self.trained_tokens += int(mask.sum())
        for source, count in counts.items():
            self.sources[source] = self.sources.get(source, Counts()) + count
            self.total += count
        self.max_token_id = max(self.max_token_id, int(tokens.max(initial=0)))

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def finish(self, dropped: dict[str, int], truncated: int) -> SplitManifest:
        if "mask" in self.files:
            self.files["mask"].write(np.packbits(self.spare_bits).tobytes())
        self.close()
        return SplitManifest(
            documents=self.total.documents,
            tokens=self.total.tokens,
            bytes=self.total.bytes,
            trained_tokens=self.trained_tokens if "mask" in self.files else None,
            dropped=dict(sorted(dropped.items())),
            truncated=truncated,
            max_token_id=self.max_token_id,
            files={path.name: FileRecord(**file_record(path)) for path in self.paths.values()},
            blocks=_write_blocks(self.paths["tokens"]),
            sources=dict(sorted(self.sources.items())),
        )


def _write_blocks(tokens: Path) -> FileRecord:
    """Write the SHA-256 of each block of a file of tokens, 32 bytes each, beside it."""
    path = tokens.with_suffix(".blocks")
    with tokens.open("rb") as source, path.open("wb") as target:
        while block := source.read(BLOCK_BYTES):
            target.write(hashlib.sha256(block).digest())
    return FileRecord(**file_record(path))
