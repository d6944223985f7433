"""`manifest.json` of a token store: what it holds, where its documents come from, the hashes of its files."""

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lumi.config import UserError, from_dict, read_json

MANIFEST_FILE = "manifest.json"
KIND: Literal["lumi-token-store"] = "lumi-token-store"
FORMAT = 1
BLOCK_BYTES = (
    1 << 20
)  # of tokens; `<split>.blocks` has the SHA-256 of each, by which a part of the file can be read
STORE = "token store"  # as the kind of a parent
SPLITS = ("train", "validation")
TOKENIZE_COMMAND = "lumi tokenize --corpus-dirs CORPUS --tokenizer-dir TOKENIZER --output-dir"


@dataclass(frozen=True, kw_only=True)
class FileRecord:
    """Size in bytes and SHA-256 of a file."""

    size: int
    sha256: str


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Documents, their tokens (BOS and EOS included), and the UTF-8 bytes of the trained text.

    The trained text of a conversation is its answers.
    """

    documents: int = 0
    tokens: int = 0
    bytes: int = 0

    def __add__(self, other: "Counts") -> "Counts":
        return Counts(
            documents=self.documents + other.documents,
            tokens=self.tokens + other.tokens,
            bytes=self.bytes + other.bytes,
        )


@dataclass(frozen=True, kw_only=True)
class SplitManifest:
    """What one split holds, in all and per source, and its files by name.

    Three fields describe conversations: `trained_tokens` (None: all tokens, as in texts); `dropped`, the
    conversations without a trained token, and the pairs, by reason; `truncated`, the number that lost answers
    to `max_tokens`. `blocks` is the file `<split>.blocks`, None in stores of earlier versions; it follows
    from the tokens, so it is none of `files`.
    """

    documents: int
    tokens: int
    bytes: int
    trained_tokens: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    truncated: int = 0
    max_token_id: int
    files: dict[str, FileRecord]
    blocks: FileRecord | None = None
    sources: dict[str, Counts]

    def describe(self, pairs: bool = False) -> str:
        """One line for people; `pairs`: the store's."""
        if self.trained_tokens is None:
            density = f"{self.bytes / self.tokens:.2f} bytes per token"
            return f"{self.documents:,} documents, {self.tokens:,} tokens, {density}"
        share = f"{self.trained_tokens:,} trained ({self.trained_tokens / self.tokens:.1%})"
        dropped = "".join(f"; {count:,} dropped: {reason}" for reason, count in self.dropped.items())
        truncated = f"; {self.truncated:,} truncated" if self.truncated else ""
        what = f"{self.documents // 2:,} pairs" if pairs else f"{self.documents:,} conversations"
        return f"{what}, {self.tokens:,} tokens, {share}{dropped}{truncated}"


@dataclass(frozen=True, kw_only=True)
class StoreManifest:
    """The whole of `manifest.json`.

    `inputs` is whatever decided the content besides the tokenizer: stores of equal inputs are equal.
    `template` is the name of the chat template, None for texts. With `pairs`, documents 2i and 2i + 1 are the
    chosen and the rejected conversation of one pair.
    """

    kind: Literal["lumi-token-store"] = KIND
    format: int = FORMAT
    tokenizer_fingerprint: str
    vocab_size: int
    dtype: Literal["uint16", "uint32"]
    inputs: dict[str, str]
    template: str | None = None
    pairs: bool = False
    splits: dict[str, SplitManifest]

    @property
    def files(self) -> dict[str, dict[str, Any]]:
        """Size and SHA-256 of the files of all splits, by name."""
        return {name: asdict(file) for split in self.splits.values() for name, file in split.files.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the tokenizer's fingerprint and the hashes of all files. It identifies the tokens."""
        hashes = {name: file["sha256"] for name, file in self.files.items()}
        decisive = json.dumps([self.tokenizer_fingerprint, hashes], sort_keys=True)
        return hashlib.sha256(decisive.encode()).hexdigest()


def token_dtype(vocab_size: int) -> np.dtype:
    """The smaller of little-endian uint16 and uint32 that holds every id below `vocab_size`."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def is_token_store(folder: str | Path) -> bool:
    """Whether a folder has a token store's manifest. Raises UserError if manifest.json is not JSON."""
    path = Path(folder) / MANIFEST_FILE
    manifest = read_json(path) if path.is_file() else None
    return isinstance(manifest, dict) and manifest.get("kind") == KIND


def read_store_manifest(folder: str | Path) -> StoreManifest:
    """The manifest of a token store. Raises UserError: no token store, another format, or damaged."""
    path = Path(folder) / MANIFEST_FILE
    if not is_token_store(folder):
        raise UserError(
            f"{folder}:",
            "must be a finished token store",
            got=_what_is_there(path),
            remedy=f"make one with `{TOKENIZE_COMMAND} {folder}`",
        )
    data = read_json(path)
    if data.get("format") != FORMAT:
        remedy = "tokenize again with this version of lumi"
        raise UserError(f"{path}: format", f"must be {FORMAT}", got=data.get("format"), remedy=remedy)
    manifest = from_dict(StoreManifest, data, where=str(path))
    dtype = token_dtype(manifest.vocab_size).name
    if manifest.dtype != dtype:
        raise UserError(
            f"{path}: dtype", f"must be {dtype} for {manifest.vocab_size} ids", got=manifest.dtype
        )
    for name, split in manifest.splits.items():
        required = {f"{name}.tokens", f"{name}.offsets"}
        if name not in SPLITS or not required <= split.files.keys() <= required | {f"{name}.mask"}:
            got = f"{name!r} with {', '.join(split.files)}"
            raise UserError(f"{path}: splits", f"must be {' or '.join(SPLITS)} with their files", got=got)
    return manifest


def _what_is_there(path: Path) -> str:
    if path.is_file():
        return f"a {path.name} of something else"
    return f"no {path.name}" if path.parent.is_dir() else "no such folder"
