"""Stage 3: corpus folders -> a token store, and the cache that lets training read a corpus folder straight away."""

import errno
import hashlib
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

from lumi.config import UserError
from lumi.corpus import CorpusReader, is_corpus, read_corpus
from lumi.encoding import Texts, encode_all
from lumi.progress import progress_bar
from lumi.storage import TEMPORARY_PREFIX, atomic_folder
from lumi.token_store import TOKENIZE_COMMAND, Split, StoreManifest, StoreWriter, TokenStore, is_token_store, read_store_manifest
from lumi.tokenizer import Tokenizer
from lumi.workers import num_cores

__all__ = ["Split", "StoreManifest", "StoreWriter", "TokenStore", "open_or_tokenize", "token_cache", "tokenize"]

DEFAULT_VALIDATION_FRACTION = 0.005


def tokenize(
    corpus_dirs: Sequence[str | Path],
    tokenizer: Tokenizer,
    output_dir: str | Path,
    *,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    num_workers: int | None = None,
) -> StoreManifest:
    """Write the documents of corpus folders as a token store; one of the same inputs that is there already is kept.

    Args:
        corpus_dirs: what `lumi prepare` wrote; the documents keep their order.
        tokenizer: encodes them.
        output_dir: new, empty, or a token store of the same inputs.
        validation_fraction: expected share of the documents that go to the validation split, 0 <= fraction < 1; a document's
            side is decided by the hash of its text alone.
        num_workers: threads; None: one for each core that this process may use. The result does not depend on it.

    Raises:
        UserError: an argument out of range, a split without documents, or something else in `output_dir`.
    """
    output_dir = Path(output_dir)
    if not 0 <= validation_fraction < 1:
        raise UserError(f"--validation-fraction must be at least 0 and less than 1, got {validation_fraction}")
    if not corpus_dirs:
        raise UserError("--corpus-dirs must name at least one corpus folder, got none")
    readers = [read_corpus(folder) for folder in corpus_dirs]
    inputs = {f"corpus {index}": _corpus_fingerprint(reader) for index, reader in enumerate(readers)}
    inputs["validation_fraction"] = str(float(validation_fraction))
    if (existing := _existing_store(output_dir, tokenizer, inputs)) is not None:
        print(f"{output_dir}: already holds these documents in tokens of this tokenizer; kept", file=sys.stderr)
        return existing
    _sweep(output_dir)
    num_workers = num_cores() if num_workers is None else num_workers
    encoded = encode_all(_read_batches(readers), tokenizer, validation_fraction=validation_fraction, num_workers=num_workers)
    try:
        with atomic_folder(output_dir) as folder:
            writer = StoreWriter(folder, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size)
            lowest_rank = 1.0
            try:
                for batch in encoded:
                    for split, documents in batch.items():
                        writer.append(split, documents.tokens, documents.lengths, documents.counts)
                        lowest_rank = min(lowest_rank, documents.lowest_rank / 2**64)
                manifest = writer.finish(inputs)
            finally:
                writer.close()
            _check_splits(manifest, validation_fraction, lowest_rank)
    except OSError as error:
        # Another process may have finished the same store meanwhile; the first one stays.
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or (existing := _existing_store(output_dir, tokenizer, inputs)) is None:
            raise
        return existing
    return manifest


def token_cache(corpus_dir: str | Path, tokenizer: Tokenizer) -> Path:
    """The folder inside a corpus folder where its tokens by this tokenizer are kept."""
    return Path(corpus_dir) / ".tokens" / tokenizer.fingerprint[:16]


def open_or_tokenize(
    data_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    num_workers: int | None = None,
    verify: Literal["size", "hash"] = "hash",
) -> TokenStore:
    """Open a token store, or the tokens of a corpus folder, which are made when they are first asked for.

    In a run of several processes call it in one of them first and let the others wait, so that the work is done once.

    Args:
        data_dir: a folder of `lumi tokenize` or of `lumi prepare`.
        tokenizer: of which the ids must be.
        validation_fraction, num_workers: for a corpus folder, as in `tokenize`.
        verify: as in `TokenStore.open`.

    Raises:
        UserError: `data_dir` is neither, or was made with another tokenizer, or is damaged.
    """
    folder = Path(data_dir)
    if is_token_store(folder):
        return TokenStore.open(folder, tokenizer_fingerprint=tokenizer.fingerprint, verify=verify)
    if not is_corpus(folder):
        what = "a folder without the manifest.json of either" if folder.is_dir() else "a file" if folder.exists() else "nothing there"
        raise UserError(
            f"--data-dirs must name token stores (of `lumi tokenize`) or corpus folders (of `lumi prepare`), got {folder}: {what}"
        )
    cache = token_cache(folder, tokenizer)
    if is_token_store(cache) and read_store_manifest(cache).inputs["corpus 0"] != _corpus_fingerprint(read_corpus(folder)):
        print(f"{cache}: the corpus has changed since; it is tokenized again", file=sys.stderr)
        shutil.rmtree(cache)
    tokenize([folder], tokenizer, cache, validation_fraction=validation_fraction, num_workers=num_workers)
    return TokenStore.open(cache, tokenizer_fingerprint=tokenizer.fingerprint, verify=verify)


def _read_batches(readers: Sequence[CorpusReader]) -> Iterator[Texts]:
    total = sum(len(reader) for reader in readers)
    with progress_bar("tokenizing", " documents", total=total) as progress:
        for reader in readers:
            for batch in reader.iter_batches():
                yield Texts(batch.texts, batch.sources)
                progress.update(len(batch.texts))


def _corpus_fingerprint(reader: CorpusReader) -> str:
    hashes = "".join(shard["sha256"] for shard in reader.manifest["shards"])
    return hashlib.sha256(hashes.encode()).hexdigest()


def _existing_store(output_dir: Path, tokenizer: Tokenizer, inputs: dict[str, str]) -> StoreManifest | None:
    """The manifest of a store of these inputs, None if the place is free. Raises UserError if something else is there."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    if not output_dir.is_dir() or not is_token_store(output_dir):
        raise UserError(f"--output-dir must be new, empty or a token store, got {output_dir}, which holds something else")
    manifest = read_store_manifest(output_dir)
    theirs = {"tokenizer": manifest.tokenizer_fingerprint} | manifest.inputs
    ours = {"tokenizer": tokenizer.fingerprint} | inputs
    differences = [f"{key} {theirs.get(key)} there, {ours.get(key)} asked for" for key in theirs | ours if theirs.get(key) != ours.get(key)]
    if differences:
        raise UserError(
            f"{output_dir}: holds a token store of other inputs ({'; '.join(differences)}); choose another --output-dir, or remove it"
        )
    TokenStore.open(output_dir, verify="size")
    return manifest


def _check_splits(manifest: StoreManifest, validation_fraction: float, lowest_rank: float) -> None:
    documents = sum(split.documents for split in manifest.splits.values())
    if documents == 0:
        raise UserError("--corpus-dirs must hold at least one document, got none; see the corpus' DATA_CARD.md for what was dropped")
    if "train" not in manifest.splits:
        raise UserError(
            f"--validation-fraction must leave documents to train on, got {validation_fraction} for {documents} documents; lower it, "
            f"or prepare more documents"
        )
    if validation_fraction > 0 and "validation" not in manifest.splits:
        enough = math.ceil((lowest_rank + 2**-40) * 1e6) / 1e6
        raise UserError(
            f"--validation-fraction must give the validation split at least one of the {documents} documents, got "
            f"{validation_fraction}; run `{TOKENIZE_COMMAND} STORE --validation-fraction {enough:g}` or more (0: no validation split)"
        )


def _sweep(output_dir: Path) -> None:
    """Remove what runs that died left of this store; those of live processes stay."""
    for litter in output_dir.parent.glob(f"{TEMPORARY_PREFIX}{output_dir.name}-*"):
        pid = litter.name.rpartition("-")[2]
        if litter.is_dir() and pid.isdigit() and not _is_alive(int(pid)):
            shutil.rmtree(litter)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
