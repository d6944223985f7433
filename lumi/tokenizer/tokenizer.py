"""Text <-> token ids: what every tokenizer here does.

Two kinds do it: `sentencepiece_bpe` applies Lumi's own models, `hugging_face` those of others.
"""

import codecs
import copy
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np

from lumi.chat.token_writer import Follows
from lumi.config import UserError
from lumi.host.provenance import Parent
from lumi.host.text import utf8

PROBE = "  a\tb \r\n\n é e\u0301 ﬁ ½ ① ｶﾞ \u00a0\u3000\ufeff 12 "  # what the usual normalizers change


class Description(NamedTuple):
    """What a tokenizer does, for those who write it in another format.

    Attributes:
        data: the content of a `tokenizer.json` with all of its tokens, but without what puts a space before
            a text.
        scheme: when a space is put before a text, in the words of `Metaspace`: "always", "first" or "never".
        spells_spaces: the vocabulary writes ▁ for a space and bytes as <0x0A>; otherwise it is of bytes in
            GPT-2's alphabet.
    """

    data: dict[str, Any]
    scheme: str
    spells_spaces: bool


class Tokenizer(ABC):
    """Text <-> token ids; `decode(encode(text)) == normalize(text)` for every text.

    `encode` takes plain text: "<s>" or "<|im_start|>" in it is spelt out like any other characters, and
    control ids come only from code that asks for them. (transformers' tokenizers, by design, do read such
    markers out of the text.)

    Attributes:
        vocab_size: number of token ids.
        bos_id, eos_id, unk_id, pad_id: the special ids; None where the tokenizer has none. Every one has EOS.
        begin_ids: what stands before every text: BOS, or nothing.
        eos_ids: what ends a text: `eos_id` first, then the others that `generation_config.json` names.
        control_ids: id of every control token, by name.
        fingerprint: a SHA-256 of all that decides the ids, in hexadecimal.
        token_bytes: (vocab_size,) int32, number of UTF-8 bytes of each token; 0 for control ids.
        chat_template: the Jinja template that is saved beside the model. A new tokenizer of Lumi's has
            ChatML's; None where there is none, as beside a base model of others.
        loss: what `normalize` changes in a text, in words; None where it changes nothing.
        folder: where it was loaded from; None where it was made in memory.
    """

    vocab_size: int
    bos_id: int | None
    eos_id: int
    unk_id: int | None
    pad_id: int | None
    begin_ids: tuple[int, ...]
    eos_ids: tuple[int, ...]
    control_ids: Mapping[str, int]
    fingerprint: str
    token_bytes: np.ndarray
    chat_template: str | None
    loss: str | None = None
    folder: Path | None = None

    def __init__(self, bytes_of_tokens: Sequence[bytes]) -> None:
        self._bytes = bytes_of_tokens
        self.vocab_size = len(bytes_of_tokens)
        self.token_bytes = np.array([len(data) for data in bytes_of_tokens], dtype=np.int32)

    def with_chat_template(self, template: str | None) -> Self:
        """A copy that carries another Jinja chat template, or none."""
        other = copy.copy(self)
        other.chat_template = template
        return other

    def with_ends(self, ends: Iterable[int]) -> Self:
        """A copy for which further ids end a text, as a model's `generation_config.json` names them."""
        other = copy.copy(self)
        other.eos_ids = tuple(dict.fromkeys((*self.eos_ids, *ends)))
        return other

    @property
    def as_parents(self) -> list[Parent]:
        """The tokenizer as what something is made from; empty where it has no folder."""
        return [] if self.folder is None else [Parent("tokenizer", self.folder, self.fingerprint)]

    @property
    def prefix_id(self) -> int:
        """What a text is scored after that has nothing before it: BOS, or EOS where there is no BOS."""
        return self.eos_id if self.bos_id is None else self.bos_id

    def control_id(self, name: str) -> int | None:
        """The id of a control token such as "<|im_start|>", None where there is none of that name."""
        return self.control_ids.get(name)

    def extends(self, other: "Tokenizer") -> bool:
        """Whether all of the other's tokens are here under their ids; there may be more."""
        same_bytes = list(self._bytes[: other.vocab_size]) == list(other._bytes)
        return same_bytes and other.control_ids.items() <= self.control_ids.items()

    @abstractmethod
    def encode_utf8(self, data: bytes, follows: Follows = "nothing") -> list[int]:
        """Token ids of valid UTF-8, as `encode` gives them for the text."""

    @abstractmethod
    def describe(self) -> Description:
        """What it does, as a `tokenizer.json`."""

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Write the tokenizer, and what transformers needs beside it, into `folder`. It may hold other files.

        Imported files are copied unchanged. A different chat template replaces only the template. Where only
        `tokenizer.model` came, the others are made of it.

        Raises:
            UserError: `folder` holds another tokenizer.
        """

    def encode(self, text: str, follows: Follows = "nothing") -> list[int]:
        """Token ids of a text, never a control id, without BOS.

        Args:
            follows: what stands before the text: nothing, a control token or other text. It matters to
                tokenizers that put a space before a text.

        Raises:
            UserError: the text holds a lone surrogate; names its place.
        """
        return self.encode_utf8(utf8(text), follows)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them. Raises UserError with a lone surrogate's place."""
        return [self.encode_utf8(utf8(text)) for text in texts]

    def normalize(self, text: str) -> str:
        """The text as `decode` gives it back: the same, unless the tokenizer of others has a normalizer."""
        return text

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of token ids. Control ids stand for nothing, bytes that are not UTF-8 become U+FFFD.

        Args:
            continues: the ids follow others, as a model's answer follows its prompt. Their first space then
                belongs to them.

        Raises:
            UserError: an id outside [0, vocab_size).
        """
        data = b"".join(map(self.piece_bytes, ids))
        return (data if continues else self._without_prefix(data)).decode("utf-8", errors="replace")

    def _without_prefix(self, data: bytes) -> bytes:
        """Take off what `encode` puts before a text that follows nothing."""
        return data

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, possibly part of a character. Raises UserError for an impossible id."""
        if not 0 <= token_id < self.vocab_size:
            got = f"{token_id}: was it made by another tokenizer?"
            raise UserError("a token id", f"must be between 0 and {self.vocab_size - 1}", got=got)
        return self._bytes[token_id]


class StreamDecoder:
    """Decodes ids one by one; the texts, joined, are `tokenizer.decode(ids, continues=True)`."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The characters that this token completes, possibly none."""
        return self._decoder.decode(self._tokenizer.piece_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, otherwise nothing. The decoder then starts anew."""
        return self._decoder.decode(b"", final=True)
