"""A corpus folder as training data: it is tokenized at its first use, into a folder inside it."""

import sys
from pathlib import Path
from typing import Literal

from lumi.chat.rendering import template_of
from lumi.config import UserError
from lumi.corpus import is_corpus, read_corpus
from lumi.data.store_manifest import is_token_store, read_store_manifest
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import DEFAULT_VALIDATION_FRACTION, corpus_fingerprint, tokenize
from lumi.host.storage import remove_folder
from lumi.tokenizer.tokenizer import Tokenizer


def token_cache(corpus_dir: str | Path, tokenizer: Tokenizer) -> Path:
    """The place in a corpus folder for its tokens by this tokenizer and, unless of texts, its template."""
    name = tokenizer.fingerprint[:16]
    if read_corpus(corpus_dir).holds != "texts" and (template := template_of(tokenizer)) is not None:
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
    """Open a token store, or the tokens of a corpus folder, which are made at the first call.

    In a run of several processes one calls it first and the others wait, so that the work is done once.

    Args:
        data_dir: made by `lumi tokenize` or `lumi prepare`.
        tokenizer: must have made the ids. Its chat template lays out the conversations of a corpus folder.
        validation_fraction, num_workers: for a corpus folder, as in `tokenize`.
        verify: as in `TokenStore.open`.

    Raises:
        UserError: `data_dir` is neither, was made with another tokenizer, or is damaged.
    """
    folder = Path(data_dir)
    if not is_token_store(folder):
        if not is_corpus(folder):
            raise UserError(
                "--data-dirs",
                "must name token stores (of `lumi tokenize`) or corpus folders (of `lumi prepare`)",
                got=f"{folder}: {_what_is_there(folder)}",
            )
        folder = _tokenized(folder, tokenizer, validation_fraction, num_workers)
    return TokenStore.open(
        folder, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, verify=verify
    )


def _tokenized(
    corpus_dir: Path, tokenizer: Tokenizer, validation_fraction: float, num_workers: int | None
) -> Path:
    """The cache of a corpus folder, up to date."""
    cache = token_cache(corpus_dir, tokenizer)
    if is_token_store(cache):
        cached = read_store_manifest(cache).inputs["corpus 0"]
        if cached != corpus_fingerprint(read_corpus(corpus_dir)):
            print(f"{cache}: the corpus has changed since; it is tokenized again", file=sys.stderr)
            remove_folder(cache)
    tokenize([corpus_dir], tokenizer, cache, validation_fraction=validation_fraction, num_workers=num_workers)
    return cache


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return "a folder without the manifest.json of either"
    return "a file" if path.exists() else "nothing there"
