"""The token store on disk: per split one flat array of tokens, document offsets and perhaps a loss mask; `manifest.json` comes last.

A text is BOS, its ids, EOS; a conversation is what a chat template makes of it. `<split>.tokens` is uint16, or uint32 past 65,536
ids; `<split>.offsets` is uint64, where each document begins in the tokens and, last, their number; `<split>.mask` has one bit per
token, the first in the highest bit of the first byte. All little-endian. Sequence length is not baked in.
"""

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np

from lumi.config import UserError, from_dict, read_json, to_dict, write_json
from lumi.data.encoding import token_dtype
from lumi.data.stored_array import StoredArray
from lumi.host.storage import check_file, file_record

KIND: Literal["lumi-token-store"] = "lumi-token-store"
FORMAT = 1
SPLITS = ("train", "validation")
TOKENIZE_COMMAND = "lumi tokenize --corpus-dirs CORPUS --tokenizer-dir TOKENIZER --output-dir"
_CHECK_TOKENS = 1 << 24


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """`tokens` counts BOS and EOS; `bytes` are those of the trained text in UTF-8: of a conversation, those of its answers."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """What one split holds, in all and from each source; files by name.

    Of conversations: `trained_tokens` (None: all of them, as in texts), `dropped`, by reason, those without a trained token, and
    `truncated`, those that lost answers to a limit of tokens.
    """

    documents: int
    tokens: int
    bytes: int
    trained_tokens: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    max_token_id: int
    files: dict[str, FileRecord]
    sources: dict[str, Counts]

    def describe(self) -> str:
        """One line for people."""
        if self.trained_tokens is None:
            return f"{self.documents:,} documents, {self.tokens:,} tokens, {self.bytes / self.tokens:.2f} bytes per token"
        share = f"{self.trained_tokens:,} trained ({self.trained_tokens / self.tokens:.1%})"
        dropped = "".join(f"; {count:,} dropped: {reason}" for reason, count in self.dropped.items())
        truncated = f"; {self.truncated:,} truncated" if self.truncated else ""
        return f"{self.documents:,} conversations, {self.tokens:,} tokens, {share}{dropped}{truncated}"


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """`manifest.json`. `inputs` is whatever decided the content besides the tokenizer: stores of equal inputs are equal.

    `template` is the name of the chat template, None for texts.
    """

    kind: Literal["lumi-token-store"] = KIND
    format: int = FORMAT
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    inputs: dict[str, str]
    template: str | None = None
    splits: dict[str, SplitManifest]


@dataclass
class Split:
    """One split of a token store.

    tokens: (num_tokens,) uint16 or uint32; of a file, read as they are asked for by `tokens[start:stop]`.
    offsets: (num_documents + 1,) uint64, where each document begins in `tokens`.
    mask: the packed loss mask, (ceil(num_tokens / 8),) uint8, or None where every token is trained. num_bytes: of the trained text.
    """

    tokens: np.ndarray | StoredArray
    offsets: np.ndarray
    mask: np.ndarray | None
    num_bytes: int

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
    """A finished token store: `manifest`, and the splits by name."""

    def __init__(self, folder: Path, manifest: StoreManifest, splits: dict[str, Split]):
        self.folder, self.manifest, self.splits = folder, manifest, splits

    @classmethod
    def open(
        cls,
        folder: str | Path,
        *,
        tokenizer_fingerprint: str | None = None,
        vocab_size: int | None = None,
        verify: Literal["size", "hash"] = "hash",
    ) -> "TokenStore":
        """Open a token store and check that it is what was written.

        Args:
            folder: what `lumi tokenize` wrote.
            tokenizer_fingerprint, vocab_size: of the tokenizer that the ids must be of; None accepts any.
            verify: "hash" reads every byte once, for its SHA-256 and the largest id (about 1 s per GB); "size" trusts the content of
                files of the right size and the largest id on record. One process of a run with "hash" is enough.

        Raises:
            UserError: not a token store, another tokenizer, a file missing, truncated or corrupt, ids outside the vocabulary.
        """
        folder = Path(folder)
        manifest = read_store_manifest(folder)
        command = f"`{TOKENIZE_COMMAND} {folder}`"
        if tokenizer_fingerprint is not None and manifest.tokenizer_fingerprint != tokenizer_fingerprint:
            raise UserError(
                f"{folder}: must be made with the tokenizer of fingerprint {tokenizer_fingerprint}, got a token store of "
                f"{manifest.tokenizer_fingerprint}; give that tokenizer, or tokenize into another folder with `{TOKENIZE_COMMAND} STORE`"
            )
        remedy = f"copy the store again, or remove it and run {command}"
        num_ids = manifest.vocab_size if vocab_size is None else min(vocab_size, manifest.vocab_size)
        splits = {
            name: _open_split(folder, name, manifest, num_ids, remedy, verify == "hash")
            for name in manifest.splits
        }
        return cls(folder, manifest, splits)

    def has_split(self, name: str) -> bool:
        """Whether the store has the split "train" or "validation"."""
        return name in self.splits

    def split(self, name: str) -> Split:
        """The split "train" or "validation". Raises UserError if the store has none of that name."""
        if name not in self.splits:
            raise UserError(
                f"{self.folder}: must hold the split {name!r}, got {', '.join(self.splits)}; make one with "
                f"`{TOKENIZE_COMMAND} STORE --validation-fraction FRACTION`"
            )
        return self.splits[name]


class StoreWriter:
    """Appends documents to the splits of a store in `folder`, which must be empty; `finish` writes the manifest.

    Args:
        folder: best an `atomic_folder`.
        tokenizer_fingerprint, vocab_size: of the tokenizer of the ids.
    """

    def __init__(self, folder: Path, *, tokenizer_fingerprint: str, vocab_size: int):
        self.folder, self.fingerprint, self.vocab_size = folder, tokenizer_fingerprint, vocab_size
        self.dropped: dict[str, Counter[str]] = {name: Counter() for name in SPLITS}
        self.truncated: Counter[str] = Counter()
        self._splits: dict[str, _SplitWriter] = {}

    def append(
        self,
        split: str,
        tokens: np.ndarray,
        lengths: np.ndarray,
        counts: dict[str, tuple[int, int, int]],
        mask: np.ndarray | None = None,
    ) -> None:
        """Append documents.

        Args:
            split: "train" or "validation".
            tokens: (T,) integers below vocab_size, the documents one after another.
            lengths: (documents,) integers that add up to T, each at least 1.
            counts: per source the documents, tokens and bytes of text among these.
            mask: (T,) bool, which tokens are trained; None: all, and then for every document of the split.
        """
        if len(lengths) == 0:
            return
        counted = tuple(map(sum, zip(*counts.values(), strict=True)))[:2]
        if lengths.min() < 1 or counted != (len(lengths), len(tokens)) or lengths.sum() != len(tokens):
            raise ValueError(
                f"lengths must be at least 1 and add up, as counts do, to {len(lengths)} documents of {len(tokens)} tokens, got a length "
                f"of {lengths.min()}, a sum of {lengths.sum()}, and counts of {counted}"
            )
        if mask is not None and len(mask) != len(tokens):
            raise ValueError(f"mask must have one value for each of {len(tokens)} tokens, got {len(mask)}")
        if tokens.min() < 0 or tokens.max() >= self.vocab_size:
            raise UserError(
                f"token ids must be between 0 and {self.vocab_size - 1}, got {tokens.min()} to {tokens.max()}"
            )
        if split not in self._splits:
            self._splits[split] = _SplitWriter(
                self.folder, split, token_dtype(self.vocab_size), mask is not None
            )
        self._splits[split].append(tokens, lengths, counts, mask)

    def count_dropped(self, split: str, dropped: dict[str, int], truncated: int) -> None:
        """Add to what the manifest says of a split: documents that are not in it, by reason, and documents that are shorter in it."""
        self.dropped[split].update(dropped)
        self.truncated[split] += truncated

    def close(self) -> None:
        """Close the files without finishing; harmless after `finish`."""
        for writer in self._splits.values():
            writer.close()

    def finish(self, inputs: dict[str, str], template: str | None = None) -> StoreManifest:
        """Close the files and write the manifest, whose fields the arguments are."""
        manifest = StoreManifest(
            tokenizer_fingerprint=self.fingerprint,
            vocab_size=self.vocab_size,
            dtype="uint16" if token_dtype(self.vocab_size).itemsize == 2 else "uint32",
            inputs=inputs,
            template=template,
            splits={
                name: self._splits[name].finish(self.dropped[name], self.truncated[name])
                for name in sorted(self._splits)
            },
        )
        write_json(self.folder / "manifest.json", to_dict(manifest))
        return manifest


class _SplitWriter:
    def __init__(self, folder: Path, name: str, dtype: np.dtype, has_mask: bool):
        kinds = ("tokens", "offsets", "mask") if has_mask else ("tokens", "offsets")
        self.paths = {kind: folder / f"{name}.{kind}" for kind in kinds}
        self.files: dict[str, BinaryIO] = {kind: path.open("wb") for kind, path in self.paths.items()}
        self.dtype = dtype
        self.total = (0, 0, 0)  # documents, tokens, bytes
        self.sources: dict[str, tuple[int, int, int]] = {}
        self.max_token_id = self.trained_tokens = 0
        self.spare_bits = np.zeros(0, dtype=bool)  # fewer than 8, which do not fill a byte of the mask yet
        self.files["offsets"].write(np.zeros(1, dtype="<u8").tobytes())

    def append(
        self,
        tokens: np.ndarray,
        lengths: np.ndarray,
        counts: dict[str, tuple[int, int, int]],
        mask: np.ndarray | None,
    ) -> None:
        if (mask is not None) != ("mask" in self.files):
            raise ValueError("mask must be given for every document of a split or for none")
        self.files["tokens"].write(tokens.astype(self.dtype).tobytes())
        self.files["offsets"].write((self.total[1] + np.cumsum(lengths)).astype("<u8").tobytes())
        if mask is not None:
            bits = np.concatenate([self.spare_bits, mask.astype(bool)])
            whole = len(bits) - len(bits) % 8
            self.files["mask"].write(np.packbits(bits[:whole]).tobytes())
            self.spare_bits = bits[whole:]
            self.trained_tokens += int(mask.sum())
        for source, count in counts.items():
            self.sources[source] = _add(self.sources.get(source, (0, 0, 0)), count)
            self.total = _add(self.total, count)
        self.max_token_id = max(self.max_token_id, int(tokens.max(initial=0)))

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def finish(self, dropped: dict[str, int], truncated: int) -> SplitManifest:
        if "mask" in self.files:
            self.files["mask"].write(np.packbits(self.spare_bits).tobytes())
        self.close()
        return SplitManifest(
            documents=int(self.total[0]),
            tokens=int(self.total[1]),
            bytes=int(self.total[2]),
            trained_tokens=self.trained_tokens if "mask" in self.files else None,
            dropped=dict(sorted(dropped.items())),
            truncated=truncated,
            max_token_id=self.max_token_id,
            files={path.name: FileRecord(**file_record(path)) for path in self.paths.values()},
            sources={
                name: Counts(documents=d, tokens=t, bytes=b)
                for name, (d, t, b) in sorted(self.sources.items())
            },
        )


def _add(a: tuple[int, int, int], b: tuple[int, int, int]) -> tuple[int, int, int]:
    return a[0] + b[0], a[1] + b[1], a[2] + b[2]


def is_token_store(folder: str | Path) -> bool:
    """Whether a folder holds a finished token store; its files are not looked at. Raises UserError if its manifest.json is damaged."""
    path = Path(folder) / "manifest.json"
    manifest = read_json(path) if path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def read_store_manifest(folder: str | Path) -> StoreManifest:
    """The manifest of a token store. Raises UserError: not a token store, of another version, or damaged."""
    path = Path(folder) / "manifest.json"
    if not is_token_store(folder):
        what = (
            "a manifest.json of something else"
            if path.is_file()
            else "no manifest.json"
            if Path(folder).is_dir()
            else "no such folder"
        )
        raise UserError(
            f"{folder}: must be a finished token store, got {what}; make one with `{TOKENIZE_COMMAND} {folder}`"
        )
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise UserError(
            f"{path}: format must be {FORMAT}, got {data.get('format')}; tokenize again with this version of lumi"
        )
    manifest = from_dict(StoreManifest, data, where=str(path))
    if manifest.dtype != token_dtype(manifest.vocab_size).name:
        raise UserError(
            f"{path}: dtype must be {token_dtype(manifest.vocab_size).name} for {manifest.vocab_size} ids, got {manifest.dtype}"
        )
    for name, split in manifest.splits.items():
        names = {f"{name}.tokens", f"{name}.offsets"}
        if name not in SPLITS or not names <= split.files.keys() <= names | {f"{name}.mask"}:
            raise UserError(
                f"{path}: splits must be {' or '.join(SPLITS)} with their files, got {name!r} with {', '.join(split.files)}"
            )
    return manifest


def _open_split(
    folder: Path, name: str, manifest: StoreManifest, num_ids: int, remedy: str, check_hash: bool
) -> Split:
    split = manifest.splits[name]
    dtype = token_dtype(manifest.vocab_size)
    arrays: dict[str, StoredArray] = {}
    for kind, array_dtype, length in (
        ("tokens", dtype, split.tokens),
        ("offsets", np.dtype("<u8"), split.documents + 1),
        ("mask", np.dtype("u1"), -(-split.tokens // 8)),
    ):
        record = split.files.get(f"{name}.{kind}")
        if record is None:
            continue
        path, size = folder / f"{name}.{kind}", length * array_dtype.itemsize
        if record.size != size or record.size == 0:
            raise UserError(
                f"{folder / 'manifest.json'}: size of {path.name} must be {size} for its counts, got {record.size}; {remedy}"
            )
        check_file(path, {"size": record.size, "sha256": record.sha256}, remedy=remedy, check_hash=check_hash)
        arrays[kind] = StoredArray(path, array_dtype, length, remedy=remedy)
    tokens, offsets = arrays["tokens"], arrays["offsets"][:]
    if offsets[0] != 0 or offsets[-1] != split.tokens or (offsets[1:] <= offsets[:-1]).any():
        raise UserError(
            f"{folder / name}.offsets: must rise from 0 to {split.tokens}, got other values: the file is corrupt; {remedy}"
        )
    highest = split.max_token_id
    if check_hash:
        highest = max(
            int(tokens[start : start + _CHECK_TOKENS].max()) for start in range(0, len(tokens), _CHECK_TOKENS)
        )
    if highest >= num_ids:
        raise UserError(f"{folder / name}.tokens: ids must be below {num_ids}, got {highest}; {remedy}")
    return Split(
        tokens=tokens,
        offsets=offsets,
        mask=arrays["mask"][:] if "mask" in arrays else None,
        num_bytes=split.bytes,
    )
