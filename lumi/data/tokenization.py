"""Stage `tokenize`: corpus folders -> a token store."""

import errno
import math
import sys
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from lumi.chat.foreign_rendering import ForeignTemplate
from lumi.chat.rendering import check_controls, template_of
from lumi.chat.templates import TEMPLATES, Template
from lumi.config import UserError
from lumi.corpus import CorpusReader, read_corpus
from lumi.data.encoding import Documents, Encoded, EncodingSettings, encode_all
from lumi.data.store_manifest import (
    STORE,
    TOKENIZE_COMMAND,
    StoreManifest,
    is_token_store,
    read_store_manifest,
)
from lumi.data.store_writer import StoreWriter
from lumi.data.token_store import TokenStore
from lumi.host.progress import progress_bar
from lumi.host.provenance import record_files, write_provenance
from lumi.host.storage import atomic_folder, check_output, sweep_dead
from lumi.host.workers import num_cores
from lumi.tokenizer.tokenizer import Tokenizer

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
    """Write the documents of corpus folders as a token store, unless `output_dir` holds that store already.

    Args:
        corpus_dirs: made by `lumi prepare`, all of texts, all of conversations or all of pairs. The documents
            keep their order.
        tokenizer: encodes them.
        output_dir: new, empty, or a token store of the same inputs.
        validation_fraction: expected share of the documents for the validation split, 0 <= fraction < 1. The
            hash of its content alone decides where a document goes. None: 0.005, or 0 with
            `validation_corpus_dirs`.
        validation_corpus_dirs: corpus folders that become the validation split; `validation_fraction` must be
            0 then.
        template: lays out conversations and pairs. None: the one that is the tokenizer's chat template.
        max_tokens: at least 1. Conversations end at their last answer that ends within so many tokens; one
            without such an answer is dropped. A pair with a longer conversation is dropped whole.
        num_workers: threads. None: one for each core that this process may use. The result does not depend on
            it.

    Raises:
        UserError: an argument is out of range or has no effect; a split is empty; `output_dir` holds
            something else.
    """
    output_dir = Path(output_dir)
    plan = plan_store(
        corpus_dirs,
        tokenizer,
        validation_fraction=validation_fraction,
        validation_corpus_dirs=validation_corpus_dirs,
        template=template,
        max_tokens=max_tokens,
    )
    if (existing := begin_store(output_dir, plan)) is not None:
        return existing
    encoded = _encode(plan, num_cores() if num_workers is None else num_workers)
    with closing(encoded):  # an exception ends the threads too
        return write_store(output_dir, encoded, plan)


class StorePlan(NamedTuple):
    """What goes into a store: corpora, those that are held out, and how documents become tokens.

    `inputs`: what decides the content besides the tokenizer.
    """

    readers: Sequence[CorpusReader]
    validation_readers: Sequence[CorpusReader]
    settings: EncodingSettings
    inputs: dict[str, str]


def plan_store(
    corpus_dirs: Sequence[str | Path],
    tokenizer: Tokenizer,
    *,
    validation_fraction: float | None = None,
    validation_corpus_dirs: Sequence[str | Path] = (),
    template: Template | None = None,
    max_tokens: int | None = None,
) -> StorePlan:
    """Arguments and errors as those of `tokenize`."""
    if validation_fraction is None:
        validation_fraction = 0.0 if validation_corpus_dirs else DEFAULT_VALIDATION_FRACTION
    _check_fraction(validation_fraction, bool(validation_corpus_dirs))
    if not corpus_dirs:
        raise UserError("--corpus-dirs", "must name at least one corpus folder", got="none")
    readers = [read_corpus(folder) for folder in corpus_dirs]
    validation_readers = [read_corpus(folder) for folder in validation_corpus_dirs]
    settings = EncodingSettings(
        tokenizer=tokenizer,
        validation_fraction=validation_fraction,
        template=_choose_template([*readers, *validation_readers], tokenizer, template, max_tokens),
        max_tokens=max_tokens,
    )
    return StorePlan(readers, validation_readers, settings, _inputs(settings, readers, validation_readers))


def begin_store(output_dir: Path, plan: StorePlan) -> StoreManifest | None:
    """The manifest of the planned store if it is there; None: it can be made. Errors as in `tokenize`."""
    tokenizer, inputs = plan.settings.tokenizer, plan.inputs
    if (existing := _existing_store(output_dir, tokenizer, inputs)) is not None:
        kept = "already holds these documents in tokens of this tokenizer; kept"
        print(f"{output_dir}: {kept}", file=sys.stderr)
        return existing
    check_output(output_dir, renamed=True)
    if tokenizer.loss is not None:
        print(f"the tokenizer does not keep every text as it is: {tokenizer.loss}", file=sys.stderr)
    sweep_dead(output_dir)
    return None


def write_store(output_dir: Path, encoded: Iterable[dict[str, Encoded]], plan: StorePlan) -> StoreManifest:
    """Write what was encoded, in the order of the plan. Raises UserError: a split is empty."""
    try:
        return _write_store(output_dir, encoded, plan)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        # Another process may have finished the same store meanwhile. The first one stays.
        if (existing := _existing_store(output_dir, plan.settings.tokenizer, plan.inputs)) is None:
            raise
        return existing


def _check_fraction(validation_fraction: float, has_validation_corpora: bool) -> None:
    if not 0 <= validation_fraction < 1:
        raise UserError(
            "--validation-fraction", "must be at least 0 and less than 1", got=validation_fraction
        )
    if has_validation_corpora and validation_fraction > 0:
        raise UserError(
            "--validation-fraction",
            "must be 0 or left out beside --validation-corpus-dirs",
            got=validation_fraction,
            remedy="leave it out",
        )


def _choose_template(
    readers: Sequence[CorpusReader], tokenizer: Tokenizer, template: Template | None, max_tokens: int | None
) -> Template | ForeignTemplate | None:
    """The template for these corpora, None for texts. Raises UserError for options that have no effect."""
    first = readers[0]
    other = next((reader for reader in readers if reader.holds != first.holds), None)
    if other is not None:
        raise UserError(
            "--corpus-dirs",
            "must be all of texts, all of conversations or all of pairs",
            got=f"{first.holds} in {first.folder} and {other.holds} in {other.folder}",
            remedy="tokenize them into two stores",
        )
    if first.holds == "texts":
        if template is not None or max_tokens is not None:
            raise UserError(
                "--template" if template is not None else "--max-tokens",
                f"must be left out for texts, and {first.folder} holds texts",
                remedy="prepare conversations, or leave it out",
            )
        return None
    if max_tokens is not None and max_tokens < 1:
        raise UserError("--max-tokens", "must be at least 1", got=max_tokens)
    chosen = template or template_of(tokenizer)
    if chosen is None:
        command = f"`{TOKENIZE_COMMAND} STORE --template TEMPLATE`"
        raise UserError(
            "--template",
            "must be given where the tokenizer has no chat template",
            remedy=f"run {command} with one of {', '.join(TEMPLATES)}",
        )
    if isinstance(chosen, Template):
        check_controls(tokenizer, chosen)
    return chosen


def _inputs(
    settings: EncodingSettings, readers: Sequence[CorpusReader], validation_readers: Sequence[CorpusReader]
) -> dict[str, str]:
    """What decides the content of the store, besides the tokenizer."""
    inputs = {f"corpus {index}": reader.fingerprint for index, reader in enumerate(readers)}
    for index, reader in enumerate(validation_readers):
        inputs[f"validation corpus {index}"] = reader.fingerprint
    inputs["validation_fraction"] = str(float(settings.validation_fraction))
    if settings.template is not None:
        inputs |= {"template": settings.template.name, "max_tokens": str(settings.max_tokens)}
    return inputs


def _existing_store(output_dir: Path, tokenizer: Tokenizer, inputs: dict[str, str]) -> StoreManifest | None:
    """The manifest of a store of these inputs, None for a free `output_dir`. Raises UserError otherwise."""
    if not output_dir.exists() or (output_dir.is_dir() and not any(output_dir.iterdir())):
        return None
    if not output_dir.is_dir() or not is_token_store(output_dir):
        got = f"{output_dir}, which holds something else"
        raise UserError("--output-dir", "must be new, empty or a token store", got=got)
    manifest = read_store_manifest(output_dir)
    theirs = {"tokenizer": manifest.tokenizer_fingerprint} | manifest.inputs
    ours = {"tokenizer": tokenizer.fingerprint} | inputs
    differences = "; ".join(
        f"{key} {theirs.get(key)} there, {ours.get(key)} asked for"
        for key in theirs | ours
        if theirs.get(key) != ours.get(key)
    )
    if differences:
        raise UserError(
            f"{output_dir}: holds a token store of other inputs ({differences})",
            remedy="choose another --output-dir, or remove it",
        )
    TokenStore.open(output_dir, verify="size")
    return manifest


def _encode(plan: StorePlan, num_workers: int) -> Generator[dict[str, Encoded], None, None]:
    yield from encode_all(_read_batches(plan.readers), plan.settings, num_workers)
    held_out = held_out_settings(plan.settings)
    yield from encode_all(_read_batches(plan.validation_readers), held_out, num_workers)


def held_out_settings(settings: EncodingSettings) -> EncodingSettings:
    """Those for corpora that are held out whole."""
    return replace(settings, validation_fraction=1.0)


def _read_batches(readers: Sequence[CorpusReader]) -> Iterator[Documents]:
    if not readers:
        return
    with progress_bar("tokenizing", " documents", total=sum(map(len, readers))) as progress:
        for reader in readers:
            for documents, sources in reader.iter_documents():
                yield Documents(documents, sources)
                progress.update(len(documents))


def _write_store(output_dir: Path, encoded: Iterable[dict[str, Encoded]], plan: StorePlan) -> StoreManifest:
    readers, validation_readers, settings, inputs = plan
    fingerprint, vocab_size = settings.tokenizer.fingerprint, settings.tokenizer.vocab_size
    with atomic_folder(output_dir) as folder:
        writer = StoreWriter(folder, tokenizer_fingerprint=fingerprint, vocab_size=vocab_size)
        try:
            lowest_rank = _append_all(writer, encoded)
            template = settings.template.name if settings.template is not None else None
            manifest = writer.finish(inputs, template, readers[0].holds == "pairs")
        finally:
            writer.close()
        dropped = writer.dropped["train"] + writer.dropped["validation"]
        _check_splits(manifest, dropped, settings.validation_fraction, bool(validation_readers), lowest_rank)
        parents = [reader.as_parent for reader in (*readers, *validation_readers)]
        write_provenance(
            folder, STORE, [*settings.tokenizer.as_parents, *parents], record_files(folder, manifest.files)
        )
    return manifest


def _append_all(writer: StoreWriter, encoded: Iterable[dict[str, Encoded]]) -> float:
    """Append everything; return the smallest validation fraction that holds out at least one document."""
    lowest_rank = 2**64
    for batch in encoded:
        for split, documents in batch.items():
            writer.append(split, documents.tokens, documents.lengths, documents.counts, documents.mask)
            writer.count_dropped(split, documents.dropped, documents.truncated)
            lowest_rank = min(lowest_rank, documents.lowest_rank)
    return lowest_rank / 2**64


def _check_splits(
    manifest: StoreManifest,
    dropped: Counter[str],
    validation_fraction: float,
    has_validation_corpora: bool,
    lowest_rank: float,
) -> None:
    """Refuse a store without the splits that were asked for. Raises UserError that says what helps."""
    documents = sum(split.documents for split in manifest.splits.values())
    lost = "".join(f"; {count:,} dropped: {reason}" for reason, count in sorted(dropped.items()))
    more = "see the corpus' DATA_CARD.md for what was dropped"
    if any(reason.startswith("refused_by_template") for reason in dropped):
        more = "choose another --template, or prepare conversations that it takes"
    elif lost:
        more = "raise --max-tokens, or prepare more conversations"
    filled = {"--corpus-dirs": documents > 0}
    if has_validation_corpora:
        filled = {
            "--corpus-dirs": "train" in manifest.splits,
            "--validation-corpus-dirs": "validation" in manifest.splits,
        }
    for option, is_filled in filled.items():
        if not is_filled:
            raise UserError(option, "must hold at least one document", got=f"none{lost}", remedy=more)
    if "train" not in manifest.splits:
        raise UserError(
            "--validation-fraction",
            "must leave documents to train on",
            got=f"{validation_fraction} for {documents} documents{lost}",
            remedy="lower it, or prepare more documents",
        )
    if validation_fraction > 0 and "validation" not in manifest.splits:
        enough = math.ceil((lowest_rank + 2**-40) * 1e6) / 1e6
        command = f"`{TOKENIZE_COMMAND} STORE --validation-fraction {enough:g}`"
        raise UserError(
            "--validation-fraction",
            f"must give the validation split at least one of the {documents} documents",
            got=f"{validation_fraction}{lost}",
            remedy=f"run {command} or more (0: no validation split)",
        )
