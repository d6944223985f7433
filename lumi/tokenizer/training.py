"""Stage `tokenizer`: corpus folders -> a tokenizer folder."""

import hashlib
import heapq
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sentencepiece

from lumi.config import UserError, to_dict
from lumi.corpus import CorpusReader, read_corpus
from lumi.host.progress import progress_bar
from lumi.host.provenance import CARD, record_files, write_provenance
from lumi.host.storage import atomic_folder, check_output
from lumi.tokenizer import files as tokenizer_files
from lumi.tokenizer.files import MODEL_FILE
from lumi.tokenizer.loading import load_tokenizer
from lumi.tokenizer.sentencepiece_bpe import (
    BOS_ID,
    EOS_ID,
    FIRST_LEARNED_ID,
    PAD_ID,
    SPECIAL_PIECES,
    UNK_ID,
    SentencePieceTokenizer,
)
from lumi.tokenizer.tokenizer import Tokenizer

_RECIPE: dict[str, Any] = {
    "model_type": "bpe",
    "normalization_rule_name": "identity",
    "remove_extra_whitespaces": False,
    "add_dummy_prefix": False,
    "byte_fallback": True,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,  # indentation in few tokens
    "hard_vocab_limit": True,
    "max_sentence_length": 16_384,
    "num_threads": 16,  # fixed: the model stores it, so another value would be another fingerprint
}
_CHUNK_CHARACTERS = 4096  # at most 16,384 bytes of UTF-8: SentencePiece drops longer sentences
# The end of a C string, SentencePiece's space, and its mark for the unknown: it drops a sentence with the
# last.
_RESERVED = re.compile("[\0▁▅]+")


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How to train a tokenizer.

    Args:
        vocab_size: pieces in all, including the 6 special and the 256 byte pieces.
        character_coverage: share of the sampled characters that get a piece of their own, 0.98 to 1. The
            others are spelt in bytes.
        max_training_bytes: UTF-8 bytes of text to learn from. A larger corpus gives an evenly spread sample.
        seed: chooses the sample, 0 to 2**63 - 1.
    """

    vocab_size: int
    character_coverage: float = 0.9999
    max_training_bytes: int = 200_000_000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.vocab_size <= FIRST_LEARNED_ID:
            expectation = f"must be more than the {FIRST_LEARNED_ID} special and byte pieces"
            raise UserError("vocab_size", expectation, got=self.vocab_size)
        if not 0.98 <= self.character_coverage <= 1:
            got = self.character_coverage
            raise UserError("character_coverage", "must be between 0.98 and 1", got=got)
        if self.max_training_bytes < 1:
            raise UserError("max_training_bytes", "must be at least 1", got=self.max_training_bytes)
        if not 0 <= self.seed < 2**63:
            raise UserError("seed", "must be between 0 and 2**63 - 1", got=self.seed)


def train_tokenizer(
    config: TokenizerConfig, corpus_dirs: Sequence[str | Path], output_dir: str | Path
) -> Tokenizer:
    """Train a tokenizer on corpus folders and write its folder. Equal corpora and configs give equal bytes.

    Raises:
        UserError: too little text for `vocab_size`; `vocab_size` too small for the characters; `output_dir`
            holds something else.
    """
    output_dir = Path(output_dir)
    existing = _existing_tokenizer(output_dir)
    readers = [read_corpus(folder) for folder in corpus_dirs]
    texts = (text for reader in readers for text in reader.iter_texts())
    progress = progress_bar("sampling", " documents", iterable=texts)
    chunks = (chunk for text in progress for chunk in split_chunks(text))
    sample = sample_chunks(chunks, config.max_training_bytes, config.seed)
    tokenizer = SentencePieceTokenizer(_train_model(config, sample))
    fingerprint = tokenizer.fingerprint
    if existing is None:
        trained_on = [line for reader in readers for line in _describe_sources(reader)]
        with atomic_folder(output_dir) as folder:
            tokenizer.save(folder)
            card = _card(tokenizer, config, trained_on, sample)
            (folder / CARD).write_text(card, encoding="utf-8")
            parents = [reader.as_parent for reader in readers]
            write_provenance(folder, "tokenizer", parents, record_files(folder))
    elif existing.fingerprint == fingerprint:
        print(f"{output_dir}: already holds this tokenizer (fingerprint {fingerprint})", file=sys.stderr)
    else:
        fingerprints = f"fingerprint {existing.fingerprint}, this one is {fingerprint}"
        raise UserError(
            f"{output_dir}: holds another tokenizer ({fingerprints})",
            remedy="choose another --output-dir or remove that folder",
        )
    tokenizer.folder = output_dir
    return tokenizer


def _card(
    tokenizer: Tokenizer, config: TokenizerConfig, trained_on: Sequence[str], sample: Sequence[str]
) -> str:
    measured = sample[:: len(sample) // 500 + 1]
    num_tokens = sum(map(len, tokenizer.encode_batch(measured)))
    return tokenizer_files.card(
        fingerprint=tokenizer.fingerprint,
        recipe=to_dict(config) | _RECIPE,
        trained_on=trained_on,
        sampled_bytes=_num_bytes(sample),
        bytes_per_token=_num_bytes(measured) / num_tokens,
    )


def split_chunks(text: str) -> Iterator[str]:
    """Cut a text into sentences that SentencePiece accepts. Only the three reserved characters are lost.

    Cuts fall before a newline or else before a space, so that they tear no word. Only a run of 4096
    characters without either is cut anywhere.
    """
    for part in _RESERVED.split(text):
        start = 0
        while len(part) - start > _CHUNK_CHARACTERS:
            end = start + _CHUNK_CHARACTERS
            cut = part.rfind("\n", start + 1, end)
            cut = cut if cut > 0 else part.rfind(" ", start + 1, end)
            cut = cut if cut > 0 else end
            yield part[start:cut]
            start = cut
        if start < len(part):
            yield part[start:]


def sample_chunks(chunks: Iterable[str], max_bytes: int, seed: int) -> list[str]:
    """At most `max_bytes` of UTF-8, spread evenly over the chunks and in their order.

    A pure function of the chunks and the seed. Every chunk has a pseudo-random rank, a keyed hash of its
    content, and the lowest ranks stay. It takes one pass, and memory for the sample alone.
    """
    kept: list[tuple[int, int, int, str]] = []  # a heap, highest rank on top: (-rank, index, bytes, chunk)
    total, limit = 0, 2**64
    key = seed.to_bytes(8, "little")
    for index, chunk in enumerate(chunks):
        data = chunk.encode()
        rank = int.from_bytes(hashlib.blake2b(data, digest_size=8, key=key).digest(), "little")
        if rank >= limit:
            continue
        heapq.heappush(kept, (-rank, index, len(data), chunk))
        total += len(data)
        while total > max_bytes:
            negative_rank, _, size, _ = heapq.heappop(kept)
            limit, total = -negative_rank, total - size
    return [chunk for _, _, _, chunk in sorted(kept, key=lambda entry: entry[1])]


def _train_model(config: TokenizerConfig, sample: Sequence[str]) -> bytes:
    if not sample:
        limit = f"max_training_bytes = {config.max_training_bytes}"
        raise UserError(
            "the sample",
            f"must hold text, but no piece of the corpus fits in {limit}",
            remedy="raise it, or check that --corpus-dirs hold documents",
        )
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sample),
            model_writer=model,
            vocab_size=config.vocab_size,
            character_coverage=config.character_coverage,
            unk_id=UNK_ID,
            unk_piece=SPECIAL_PIECES[UNK_ID],
            bos_id=BOS_ID,
            bos_piece=SPECIAL_PIECES[BOS_ID],
            eos_id=EOS_ID,
            eos_piece=SPECIAL_PIECES[EOS_ID],
            pad_id=PAD_ID,
            pad_piece=SPECIAL_PIECES[PAD_ID],
            control_symbols=list(SPECIAL_PIECES[PAD_ID + 1 :]),
            minloglevel=2,  # errors only; they arrive as exceptions
            **_RECIPE,
        )
    except RuntimeError as error:
        if (explained := _explain(error, config, sample)) is not None:
            raise explained from error
        raise
    return model.getvalue()


def _explain(error: RuntimeError, config: TokenizerConfig, sample: Sequence[str]) -> UserError | None:
    """A vocabulary that does not suit the text. SentencePiece has no other way to say so than its message."""
    if found := re.search(r"Vocabulary size too high.*value <= (\d+)", str(error)):
        supported = f"the pieces that this text supports ({_num_bytes(sample):,} bytes)"
        return UserError(
            "vocab_size",
            f"must be at most {found[1]}, {supported}",
            got=config.vocab_size,
            remedy="lower vocab_size or add text",
        )
    if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
        required = "one piece for each character besides the special and byte pieces"
        return UserError(
            "vocab_size",
            f"must be at least {found[1]}, {required}",
            got=config.vocab_size,
            remedy=f"raise vocab_size or lower character_coverage ({config.character_coverage})",
        )
    return None


def _existing_tokenizer(output_dir: Path) -> Tokenizer | None:
    if (output_dir / MODEL_FILE).is_file():
        return load_tokenizer(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        got = f"{output_dir}, which holds something else"
        raise UserError("--output-dir", "must be new, empty or a tokenizer folder", got=got)
    check_output(output_dir, renamed=True)
    return None


def _num_bytes(texts: Iterable[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _describe_sources(reader: CorpusReader) -> Iterator[str]:
    yield f"the corpus folder `{reader.folder.name}`, {len(reader):,} documents"
    for source in reader.manifest.get("sources", []):
        yield f"  of these {source['kept']:,} from {source['name']} ({source['origin']})"
