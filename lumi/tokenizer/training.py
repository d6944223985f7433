"""Stage 2: corpus folders -> a tokenizer folder."""

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
from lumi.host.storage import atomic_folder
from lumi.tokenizer import files as tokenizer_files
from lumi.tokenizer.tokenizer import (
    BOS_ID,
    EOS_ID,
    FIRST_LEARNED_ID,
    MODEL_FILE,
    PAD_ID,
    SPECIAL_PIECES,
    UNK_ID,
    Tokenizer,
)

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
    "num_threads": 16,  # fixed, because it is stored in the model: another value would be another fingerprint
}
_CHUNK_CHARACTERS = 4096  # at most 16,384 bytes of UTF-8: SentencePiece drops longer sentences
_RESERVED = re.compile(
    "[\0▁▅]+"
)  # ends of C strings, SentencePiece's space, its unknown mark: it drops sentences with the last


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig:
    """How to train a tokenizer.

    Args:
        vocab_size: pieces in all, the 6 special and the 256 byte pieces among them.
        character_coverage: share of the sampled characters that get a piece of their own, 0.98 to 1; the others are spelt in bytes.
        max_training_bytes: UTF-8 bytes of text to learn from; of a larger corpus, an evenly spread sample.
        seed: chooses the sample, 0 to 2**63 - 1.
    """

    vocab_size: int
    character_coverage: float = 0.9999
    max_training_bytes: int = 200_000_000
    seed: int = 0

    def __post_init__(self):
        if self.vocab_size <= FIRST_LEARNED_ID:
            raise ValueError(
                f"vocab_size must be more than the {FIRST_LEARNED_ID} special and byte pieces, got {self.vocab_size}"
            )
        if not 0.98 <= self.character_coverage <= 1:
            raise ValueError(f"character_coverage must be between 0.98 and 1, got {self.character_coverage}")
        if self.max_training_bytes < 1:
            raise ValueError(f"max_training_bytes must be at least 1, got {self.max_training_bytes}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed must be between 0 and 2**63 - 1, got {self.seed}")


def train_tokenizer(
    config: TokenizerConfig, corpus_dirs: Sequence[str | Path], output_dir: str | Path
) -> Tokenizer:
    """Learn a tokenizer from corpus folders and write its folder; the same corpora and config give the same bytes.

    Raises:
        UserError: too little text for `vocab_size`, `vocab_size` too small for the characters, or `output_dir` holds something else.
    """
    output_dir = Path(output_dir)
    existing = _existing_tokenizer(output_dir)
    readers = [read_corpus(folder) for folder in corpus_dirs]
    texts = (text for reader in readers for text in reader.iter_texts())
    progress = progress_bar("sampling", " documents", iterable=texts)
    sample = sample_chunks(
        (chunk for text in progress for chunk in split_chunks(text)), config.max_training_bytes, config.seed
    )
    tokenizer = Tokenizer(_train_model(config, sample), where=str(output_dir))
    if existing is not None:
        if existing.fingerprint != tokenizer.fingerprint:
            raise UserError(
                f"{output_dir}: holds another tokenizer (fingerprint {existing.fingerprint}, this one is {tokenizer.fingerprint}); "
                f"choose another --output-dir or remove that folder"
            )
        print(
            f"{output_dir}: already holds this tokenizer (fingerprint {tokenizer.fingerprint})",
            file=sys.stderr,
        )
        return tokenizer
    measured = sample[:: len(sample) // 500 + 1]
    num_tokens = sum(map(len, tokenizer.encode_batch(measured)))
    card = tokenizer_files.card(
        fingerprint=tokenizer.fingerprint,
        recipe=to_dict(config) | _RECIPE,
        trained_on=[
            source
            for folder, reader in zip(corpus_dirs, readers, strict=True)
            for source in _describe_sources(folder, reader)
        ],
        sampled_bytes=sum(len(chunk.encode()) for chunk in sample),
        bytes_per_token=sum(len(chunk.encode()) for chunk in measured) / num_tokens,
    )
    with atomic_folder(output_dir) as folder:
        tokenizer.save(folder)
        (folder / "README.md").write_text(card, encoding="utf-8")
    return tokenizer


def split_chunks(text: str) -> Iterator[str]:
    """Cut a text into sentences that SentencePiece accepts: all of it but the three characters that it reserves.

    Cuts fall before a newline or else before a space, so that no word is torn, except in runs of 4096 characters without either.
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
    """At most `max_bytes` of UTF-8, spread evenly over the chunks and in their order; a pure function of the chunks and the seed.

    Every chunk has a pseudo-random rank, from its content; those of the lowest ranks stay. One pass, memory for the sample alone.
    """
    kept: list[
        tuple[int, int, int, str]
    ] = []  # a heap with the highest rank on top: (-rank, index, bytes, chunk)
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
    num_bytes = sum(len(chunk.encode()) for chunk in sample)
    if not sample:
        raise UserError(
            f"the sample must hold text, but no piece of the corpus fits in max_training_bytes = {config.max_training_bytes}; "
            f"raise it, or check that --corpus-dirs hold documents"
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
        if found := re.search(r"Vocabulary size too high.*value <= (\d+)", str(error)):
            raise UserError(
                f"vocab_size must be at most {found[1]}, the pieces that this text supports ({num_bytes:,} bytes), got "
                f"{config.vocab_size}; lower vocab_size or add text"
            ) from error
        if found := re.search(r"smaller than required_chars\. \d+ vs (\d+)", str(error)):
            raise UserError(
                f"vocab_size must be at least {found[1]}, one piece for each character besides the special and byte pieces, got "
                f"{config.vocab_size}; raise vocab_size or lower character_coverage ({config.character_coverage})"
            ) from error
        raise
    return model.getvalue()


def _existing_tokenizer(output_dir: Path) -> Tokenizer | None:
    if (output_dir / MODEL_FILE).is_file():
        return Tokenizer.load(output_dir)
    if output_dir.exists() and (not output_dir.is_dir() or any(output_dir.iterdir())):
        raise UserError(
            f"--output-dir must be new, empty or a tokenizer folder, got {output_dir}, which holds something else"
        )
    return None


def _describe_sources(folder: str | Path, reader: CorpusReader) -> Iterator[str]:
    yield f"the corpus folder `{Path(folder).name}`, {len(reader):,} documents"
    for source in reader.manifest.get("sources", []):
        yield f"  of these {source['kept']:,} from {source['name']} ({source['origin']})"
