"""Whatever `--data-dirs` names as training data: token stores here or behind a URL, and corpus folders.

A corpus folder is tokenized at its first use.

The tokens lie in the corpus folder, where every run finds them. Where it cannot be written to, they lie in
the user's cache folder; `--cache-dir` names another place.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from lumi.chat.rendering import template_of
from lumi.config import UserError
from lumi.corpus import is_corpus, read_corpus
from lumi.corpus.folder import CorpusReader
from lumi.data.block_cache import DEFAULT_BYTES
from lumi.data.remote_store import open_remote_store
from lumi.data.store_manifest import is_token_store, read_store_manifest
from lumi.data.token_store import TokenStore
from lumi.data.tokenization import DEFAULT_VALIDATION_FRACTION, tokenize
from lumi.host.storage import check_output, is_writable, remove_folder
from lumi.host.user_cache import is_url, user_cache
from lumi.tokenizer.tokenizer import Tokenizer


def token_cache(corpus: CorpusReader, tokenizer: Tokenizer, cache_dir: str | Path | None = None) -> Path:
    """The place for a corpus's tokens by this tokenizer and, unless of texts, its template.

    Args:
        cache_dir: the folder for such places. None: the corpus folder, or the user's cache folder where that
            one is read-only and does not hold these tokens yet.
    """
    name = tokenizer.fingerprint[:16]
    if corpus.holds != "texts" and (template := template_of(tokenizer)) is not None:
        name += f"-{template.name}"
    inside = corpus.folder / ".tokens" / name
    if cache_dir is None:
        parent = inside.parent if inside.parent.exists() else corpus.folder
        if is_writable(parent) or (is_token_store(inside) and _is_current(inside, corpus)):
            return inside
        cache_dir = user_cache() / "tokens"
    return Path(cache_dir) / f"{corpus.fingerprint[:16]}-{name}"


def check_cache_options(
    cache_dir: str | Path | None, data_dirs: Sequence[str | Path], cache_bytes: int | None = None
) -> None:
    """Raises UserError where `--cache-dir` or `--cache-size` has no effect: nothing is to be cached."""
    here = [folder for folder in data_dirs if not is_url(folder)]
    if cache_bytes is not None and len(here) == len(data_dirs):
        expectation, got = "must come with a URL among --data-dirs", "folders of this machine"
        raise UserError("--cache-size", expectation, got=got, remedy="leave it out")
    if cache_dir is not None and len(here) == len(data_dirs) and all(map(is_token_store, here)):
        expectation = "must come with a corpus folder or a URL among --data-dirs"
        raise UserError(
            "--cache-dir", expectation, got="token stores" if data_dirs else "none", remedy="leave it out"
        )


def open_or_tokenize(
    data_dir: str | Path,
    tokenizer: Tokenizer,
    *,
    validation_fraction: float = DEFAULT_VALIDATION_FRACTION,
    num_workers: int | None = None,
    cache_dir: str | Path | None = None,
    cache_bytes: int | None = None,
    verify: Literal["size", "hash"] = "hash",
) -> TokenStore:
    """Open a token store, here or behind a URL, or a corpus folder's tokens, made at the first call.

    In a run of several processes one calls it first and the others wait, so that the work is done once.

    Args:
        data_dir: made by `lumi tokenize` or `lumi prepare`; or the URL of what `lumi tokenize` made.
        tokenizer: must have made the ids. Its chat template lays out the conversations of a corpus folder.
        validation_fraction, num_workers: for a corpus folder, as in `tokenize`.
        cache_dir: as in `token_cache`; for what comes from a URL None is the user's cache folder.
        cache_bytes: as in `open_remote_store`; None: 64 GB.
        verify: as in `TokenStore.open`. What comes from a URL is compared by its hashes in any case.

    Raises:
        UserError: `data_dir` is none of these, was made with another tokenizer, or is damaged; or there is no
            place for its tokens.
    """
    if is_url(data_dir):
        return open_remote_store(
            str(data_dir),
            tokenizer_fingerprint=tokenizer.fingerprint,
            vocab_size=tokenizer.vocab_size,
            cache_dir=cache_dir,
            cache_bytes=DEFAULT_BYTES if cache_bytes is None else cache_bytes,
            quiet=verify == "size",
        )
    folder = Path(data_dir)
    if not is_token_store(folder):
        if not is_corpus(folder):
            raise UserError(
                "--data-dirs",
                "must name token stores (of `lumi tokenize`) or corpus folders (of `lumi prepare`)",
                got=f"{folder}: {_what_is_there(folder)}",
            )
        folder = _tokenized(folder, tokenizer, validation_fraction, num_workers, cache_dir)
    return TokenStore.open(
        folder, tokenizer_fingerprint=tokenizer.fingerprint, vocab_size=tokenizer.vocab_size, verify=verify
    )


def _tokenized(
    corpus_dir: Path,
    tokenizer: Tokenizer,
    validation_fraction: float,
    num_workers: int | None,
    cache_dir: str | Path | None,
) -> Path:
    """The cache of a corpus folder, up to date."""
    corpus = read_corpus(corpus_dir)
    cache = token_cache(corpus, tokenizer, cache_dir)
    if is_token_store(cache) and not _is_current(cache, corpus):
        print(f"{cache}: the corpus has changed since; it is tokenized again", file=sys.stderr)
        remove_folder(cache)
    if not is_token_store(cache):
        check_output(cache, renamed=True, option="--cache-dir")
        if cache_dir is None and corpus_dir not in cache.parents:
            print(f"{corpus_dir}: cannot be written to; its tokens are kept in {cache}", file=sys.stderr)
    tokenize([corpus_dir], tokenizer, cache, validation_fraction=validation_fraction, num_workers=num_workers)
    return cache


def _is_current(cache: Path, corpus: CorpusReader) -> bool:
    return read_store_manifest(cache).inputs["corpus 0"] == corpus.fingerprint


def _what_is_there(path: Path) -> str:
    if path.is_dir():
        return "a folder without the manifest.json of either"
    return "a file" if path.exists() else "nothing there"
