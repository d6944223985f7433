"""Stage 3: corpus folders -> a token store, and the cache that lets training read a corpus folder straight away."""

import errno
import hashlib
import math
import os
import shutil
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Literal

from lumi.chat.rendering import TEMPLATES, Template, check_controls, template_of
from lumi.config import UserError
from lumi.corpus import CorpusReader, is_corpus, read_corpus
from lumi.data.encoding import Documents, Encoded, Recipe, encode_all
from lumi.data.token_store import (
    TOKENIZE_COMMAND,
    Split,
    StoreManifest,
    StoreWriter,
    TokenStore,
    is_token_store,
    read_store_manifest,
)
from lumi.host.progress import progress_bar
from lumi.host.storage import TEMPORARY_PREFIX, atomic_folder
from lumi.host.workers import num_cores
from lumi.tokenizer.tokenizer import Tokenizer

__all__ = [
    "Split",
    "StoreManifest",
    "StoreWriter",
    "TokenStore",
    "open_or_tokenize",
    "token_cache",
    "tokenize",
]

DEFAULT_VALIDATION_FRACTION = 0.005


def tokenize(
    corpus_dirs: Sequence[str | Path],
    tokenizer: Tokenizer,
    output_dir: str | Path,
    *,
    validation_fraction: float | None = None,
    validation_corpus_dirs: Sequence[str | Path] = (),
    template: Template | None = None,
    max_tokens: int | None = None,
    num_workers: int | None = None,
) -> StoreManifest:
    """Write the documents of corpus folders as a token store; one of the same inputs that is there already is kept.

    Args:
        corpus_dirs: what `lumi prepare` wrote, all of texts or all of conversations; the documents keep their order.
        tokenizer: encodes them.
        output_dir: new, empty, or a token store of the same inputs.
        validation_fraction: expected share of the documents that go to the validation split, 0 <= fraction < 1; a document's
            side is decided by the hash of its content alone. None: 0.005, or 0 with `validation_corpus_dirs`.
        validation_corpus_dirs: corpus folders that are the validation split, whole; `validation_fraction` is 0 then.
        template: lays out conversations; None: the one that is the tokenizer's chat template.
        max_tokens: at least 1; conversations end at the last answer that ends within so many tokens, and are dropped if none does.
        num_workers: threads; None: one for each core that this process may use. The result does not depend on it.

    Raises:
        UserError: an argument out of range or of no use, a split without documents, or something else in `output_dir`.
    """
    output_dir = Path(output_dir)
    if validation_fraction is None:
        validation_fraction = 0.0 if validation_corpus_dirs else DEFAULT_VALIDATION_FRACTION
    _check_fraction(validation_fraction, bool(validation_corpus_dirs))
    if not corpus_dirs:
        raise UserError("--corpus-dirs must name at least one corpus folder, got none")
    readers, validation_readers = (
        [read_corpus(folder) for folder in folders] for folders in (corpus_dirs, validation_corpus_dirs)
    )
    template = _choose_template([*readers, *validation_readers], tokenizer, template, max_tokens)
    recipe = Recipe(
        tokenizer=tokenizer, validation_fraction=validation_fraction, template=template, max_tokens=max_tokens
    )
    inputs = _inputs(recipe, readers, validation_readers)
    if (existing := _existing_store(output_dir, tokenizer, inputs)) is not None:
        print(
            f"{output_dir}: already holds these documents in tokens of this tokenizer; kept", file=sys.stderr
        )
        return existing
    _sweep(output_dir)
    encoded = _encode(
        readers, validation_readers, recipe, num_cores() if num_workers is None else num_workers
    )
    try:
        with (
            closing(encoded),
            atomic_folder(output_dir) as folder,
        ):  # whatever ends this early ends the threads too
            writer = StoreWriter(
                folder, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size
            )
            try:
                lowest_rank = _write(writer, encoded)
                manifest = writer.finish(inputs, template.name if template is not None else None)
            finally:
                writer.close()
            _check_splits(manifest, writer.dropped, recipe, bool(validation_readers), lowest_rank)
    except OSError as error:
        # Another process may have finished the same store meanwhile; the first one stays.
        if (
            error.errno not in (errno.ENOTEMPTY, errno.EEXIST)
            or (existing := _existing_store(output_dir, tokenizer, inputs)) is None
        ):
            raise
        return existing
    return manifest


def token_cache(corpus_dir: str | Path, tokenizer: Tokenizer) -> Path:
    """The folder inside a corpus folder where its tokens by this tokenizer are kept; for conversations, in its chat template."""
    name = tokenizer.fingerprint[:16]
    if read_corpus(corpus_dir).holds_conversations and (template := template_of(tokenizer)) is not None:
        name += f"-{template.name}"
    return Path(corpus_dir) / ".tokens" / name


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
        tokenizer: of which the ids must be; its chat template lays out the conversations of a corpus folder.
        validation_fraction, num_workers: for a corpus folder, as in `tokenize`.
        verify: as in `TokenStore.open`.

    Raises:
        UserError: `data_dir` is neither, or was made with another tokenizer, or is damaged.
    """
    folder = Path(data_dir)
    if is_token_store(folder):
        return _open(folder, tokenizer, verify)
    if not is_corpus(folder):
        what = (
            "a folder without the manifest.json of either"
            if folder.is_dir()
            else "a file"
            if folder.exists()
            else "nothing there"
        )
        raise UserError(
            f"--data-dirs must name token stores (of `lumi tokenize`) or corpus folders (of `lumi prepare`), got {folder}: {what}"
        )
    cache = token_cache(folder, tokenizer)
    if is_token_store(cache) and read_store_manifest(cache).inputs["corpus 0"] != _corpus_fingerprint(
        read_corpus(folder)
    ):
        print(f"{cache}: the corpus has changed since; it is tokenized again", file=sys.stderr)
        outdated = cache.with_name(f"{TEMPORARY_PREFIX}{cache.name}-{os.getpid()}")
        os.rename(
            cache, outdated
        )  # at once: what an interrupted removal leaves is no token store, and nothing would replace it
        shutil.rmtree(outdated)
    tokenize([folder], tokenizer, cache, validation_fraction=validation_fraction, num_workers=num_workers)
    return _open(cache, tokenizer, verify)


def _open(folder: Path, tokenizer: Tokenizer, verify: Literal["size", "hash"]) -> TokenStore:
    return TokenStore.open(
        folder, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, verify=verify
    )


def _check_fraction(validation_fraction: float, has_validation_corpora: bool) -> None:
    if not 0 <= validation_fraction < 1:
        raise UserError(
            f"--validation-fraction must be at least 0 and less than 1, got {validation_fraction}"
        )
    if has_validation_corpora and validation_fraction > 0:
        raise UserError(
            f"--validation-fraction must be 0 or left out beside --validation-corpus-dirs, got {validation_fraction}; leave it out"
        )


def _choose_template(
    readers: Sequence[CorpusReader], tokenizer: Tokenizer, template: Template | None, max_tokens: int | None
) -> Template | None:
    """The template for these corpora, None for texts."""
    conversations = [reader for reader in readers if reader.holds_conversations]
    if not conversations:
        if template is not None or max_tokens is not None:
            given = "--template" if template is not None else "--max-tokens"
            raise UserError(
                f"{given} must be left out for texts, and {readers[0].folder} holds texts: prepare conversations, or leave it out"
            )
        return None
    if len(conversations) < len(readers):
        texts = next(reader for reader in readers if not reader.holds_conversations)
        raise UserError(
            f"--corpus-dirs must be all of texts or all of conversations, got texts in {texts.folder} and conversations in "
            f"{conversations[0].folder}; tokenize them into two stores"
        )
    if max_tokens is not None and max_tokens < 1:
        raise UserError(f"--max-tokens must be at least 1, got {max_tokens}")
    template = template or template_of(tokenizer)
    if template is None:
        raise UserError(
            f"--template must be given where the tokenizer's chat template is none of {', '.join(TEMPLATES)}; run "
            f"`{TOKENIZE_COMMAND} STORE --template TEMPLATE` with the one that the model is to learn"
        )
    check_controls(tokenizer, template)
    return template


def _read_batches(readers: Sequence[CorpusReader]) -> Iterator[Documents]:
    if not readers:
        return
    with progress_bar("tokenizing", " documents", total=sum(len(reader) for reader in readers)) as progress:
        for reader in readers:
            for documents, sources in (
                reader.iter_conversations() if reader.holds_conversations else reader.iter_batches()
            ):
                yield Documents(documents, sources)
                progress.update(len(documents))


def _encode(
    readers: Sequence[CorpusReader],
    validation_readers: Sequence[CorpusReader],
    recipe: Recipe,
    num_workers: int,
) -> Generator[dict[str, Encoded], None, None]:
    yield from encode_all(_read_batches(readers), recipe, num_workers)
    yield from encode_all(
        _read_batches(validation_readers), replace(recipe, validation_fraction=1.0), num_workers
    )


def _write(writer: StoreWriter, encoded: Iterable[dict[str, Encoded]]) -> float:
    """Append everything; the lowest share of the hashes' range that would have put a document into the validation split."""
    lowest_rank = 2**64
    for batch in encoded:
        for split, documents in batch.items():
            writer.append(split, documents.tokens, documents.lengths, documents.counts, documents.mask)
            writer.count_dropped(split, documents.dropped, documents.truncated)
            lowest_rank = min(lowest_rank, documents.lowest_rank)
    return lowest_rank / 2**64


def _inputs(
    recipe: Recipe, readers: Sequence[CorpusReader], validation_readers: Sequence[CorpusReader]
) -> dict[str, str]:
    inputs = {f"corpus {index}": _corpus_fingerprint(reader) for index, reader in enumerate(readers)}
    inputs |= {
        f"validation corpus {index}": _corpus_fingerprint(reader)
        for index, reader in enumerate(validation_readers)
    }
    inputs["validation_fraction"] = str(float(recipe.validation_fraction))
    if recipe.template is not None:
        inputs |= {"template": recipe.template.name, "max_tokens": str(recipe.max_tokens)}
    return inputs


def _corpus_fingerprint(reader: CorpusReader) -> str:
    hashes = "".join(shard["sha256"] for shard in reader.manifest["shards"])
    return hashlib.sha256(hashes.encode()).hexdigest()


def _existing_store(output_dir: Path, tokenizer: Tokenizer, inputs: dict[str, str]) -> StoreManifest | None:
    """The manifest of a store of these inputs, None if the place is free. Raises UserError if something else is there."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    if not output_dir.is_dir() or not is_token_store(output_dir):
        raise UserError(
            f"--output-dir must be new, empty or a token store, got {output_dir}, which holds something else"
        )
    manifest = read_store_manifest(output_dir)
    theirs = {"tokenizer": manifest.tokenizer_fingerprint} | manifest.inputs
    ours = {"tokenizer": tokenizer.fingerprint} | inputs
    differences = [
        f"{key} {theirs.get(key)} there, {ours.get(key)} asked for"
        for key in theirs | ours
        if theirs.get(key) != ours.get(key)
    ]
    if differences:
        raise UserError(
            f"{output_dir}: holds a token store of other inputs ({'; '.join(differences)}); choose another --output-dir, or remove it"
        )
    TokenStore.open(output_dir, verify="size")
    return manifest


def _check_splits(
    manifest: StoreManifest,
    dropped: dict[str, Counter[str]],
    recipe: Recipe,
    has_validation_corpora: bool,
    lowest_rank: float,
) -> None:
    documents = sum(split.documents for split in manifest.splits.values())
    lost = "".join(
        f"; {count:,} dropped: {reason}"
        for reason, count in sorted((dropped["train"] + dropped["validation"]).items())
    )
    more = (
        "raise --max-tokens, or prepare more conversations"
        if lost
        else "see the corpus' DATA_CARD.md for what was dropped"
    )
    needed = (
        {"--corpus-dirs": "train", "--validation-corpus-dirs": "validation"} if has_validation_corpora else {}
    )
    if documents == 0:
        raise UserError(f"--corpus-dirs must hold at least one document, got none{lost}; {more}")
    for option, split in needed.items():
        if split not in manifest.splits:
            raise UserError(f"{option} must hold at least one document, got none{lost}; {more}")
    validation_fraction = recipe.validation_fraction
    if "train" not in manifest.splits:
        raise UserError(
            f"--validation-fraction must leave documents to train on, got {validation_fraction} for {documents} documents{lost}; lower it, "
            f"or prepare more documents"
        )
    if validation_fraction > 0 and "validation" not in manifest.splits:
        enough = math.ceil((lowest_rank + 2**-40) * 1e6) / 1e6
        raise UserError(
            f"--validation-fraction must give the validation split at least one of the {documents} documents, got "
            f"{validation_fraction}{lost}; run `{TOKENIZE_COMMAND} STORE --validation-fraction {enough:g}` or more (0: no validation split)"
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
