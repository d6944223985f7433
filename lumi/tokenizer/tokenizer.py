"""Text <-> token ids: SentencePiece BPE with byte fallback.

Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018, arXiv:1808.06226. Two kinds of models are
read: Lumi's own, whose ids SentencePiece, transformers' LlamaTokenizer and llama.cpp agree on, and those of
Llama 2 and its relatives, which put a space before every text.
"""

import codecs
import copy
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from lumi.config import UserError, write_json
from lumi.host.text import utf8
from lumi.tokenizer import files as tokenizer_files
from lumi.tokenizer.files import Surroundings

MODEL_FILE = "tokenizer.model"
_MAKE_ONE = (
    "make a tokenizer with `lumi tokenizer --config configs/tokenizer/32k.json --corpus-dirs CORPUS "
    "--output-dir TOKENIZER`"
)

# The recipe: ids 0 to 5, then the 256 bytes, then what was learned.
SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
UNK_ID, BOS_ID, EOS_ID, PAD_ID, IM_START_ID, IM_END_ID = range(6)
FIRST_BYTE_ID = len(SPECIAL_PIECES)
FIRST_LEARNED_ID = FIRST_BYTE_ID + 256

_SPACE = "▁".encode()  # U+2581, which SentencePiece writes for a space
_PROBE = "  a\tb \r\n\n é e\u0301 ﬁ ½ ① ｶﾞ \u00a0\u3000\ufeff 12 "  # what the usual normalisations change
# Appended to a model, this sets one field, `add_dummy_prefix: false` (3) of the normaliser (3): a protocol
# buffer merges repeated messages field by field. Lumi then puts the space before a text itself, and not after
# a prompt or a chat marker.
_NO_DUMMY_PREFIX = b"\x1a\x02\x18\x00"


class Tokenizer:
    """Text <-> token ids; `decode(encode(text)) == text` for every text.

    `encode` takes plain text: "<s>" or "<|im_start|>" in it is spelt out like any other characters, and
    control ids come only from code that asks for them. (transformers' tokenizers, by design, do read such
    markers out of the text.)

    Attributes:
        vocab_size: number of token ids.
        bos_id, eos_id, unk_id: the special ids.
        pad_id, im_start_id, im_end_id: None where an imported tokenizer lacks them.
        control_ids: id of every control piece, by name.
        fingerprint: SHA-256 of the model's bytes, in hexadecimal.
        token_bytes: (vocab_size,) int32, number of UTF-8 bytes of each token; 0 for special ids.
        chat_template: the Jinja template that is saved beside the model. A new tokenizer of Lumi's has
            ChatML's; None where there is none, as beside a base model of others.
    """

    def __init__(
        self, model: bytes, *, where: str = "tokenizer", surroundings: Surroundings | None = None
    ) -> None:
        is_new, surroundings = surroundings is None, surroundings or Surroundings()
        self._model, self._where, self._surroundings = model, where, surroundings
        original = _load_processor(model, where)
        self._processor = _load_processor(model + _NO_DUMMY_PREFIX, where)
        self._prefix = b" " if original.normalize("a") != self._processor.normalize("a") else b""
        self._pieces = [original.id_to_piece(i) for i in range(original.vocab_size())]
        self._is_own = not self._prefix and _is_of_the_recipe(original, self._pieces, surroundings)
        self.control_ids = _control_ids(original, self._pieces, surroundings.added, where)
        self.vocab_size = max([len(self._pieces), *(i + 1 for i in self.control_ids.values())])
        self._bytes = [_bytes_of(original, i, piece) for i, piece in enumerate(self._pieces)]
        self._bytes += [b""] * (self.vocab_size - len(self._bytes))
        self._byte_ids = {self._bytes[i]: i for i in range(len(self._pieces)) if original.is_byte(i)}
        if reason := self._unfit():
            kind = "a SentencePiece BPE model with byte fallback that keeps every text as it is"
            raise UserError(f"{where}:", f"must be {kind}, but {reason}", remedy=_MAKE_ONE)
        self.token_bytes = np.array([len(data) for data in self._bytes], dtype=np.int32)
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self.chat_template = surroundings.chat_template
        if is_new and self._is_own:
            self.chat_template = tokenizer_files.CHAT_TEMPLATE
        self.unk_id = original.unk_id()
        self.bos_id = self._required_id("bos", original.bos_id())
        self.eos_id = self._required_id("eos", original.eos_id())
        self.pad_id = self._named_id("pad", original.pad_id())
        self.im_start_id, self.im_end_id = self.control_id("<|im_start|>"), self.control_id("<|im_end|>")

    def _unfit(self) -> str | None:
        """Why this model cannot be used, or None."""
        model, size = self._processor, len(self._pieces)
        if len(self._byte_ids) < 256:
            return f"it has {len(self._byte_ids)} of the 256 byte pieces"
        special = [model.is_unknown(i) or model.is_control(i) or model.is_byte(i) for i in range(size)]
        scores = [model.get_score(i) for i in range(size) if not special[i]]
        if any(score % 1 for score in scores):  # BPE numbers its merges, unigram has log probabilities
            return "it is a unigram model"
        if scores.count(0.0) > 1:  # the score of the first merge, and of user-defined pieces
            return "it has user-defined pieces, which would be read out of a user's text"
        if self.decode(self.encode(_PROBE)) != _PROBE:
            return "it normalises"
        return None

    def _named_id(self, role: str, default: int) -> int | None:
        name = self._surroundings.names.get(role)
        if name is None:
            return default if default >= 0 else None
        named = self.control_ids | {self._pieces[self.unk_id]: self.unk_id}  # Llama 2 pads with <unk>
        if name not in named:
            raise UserError(
                f"{self._where}: {role}_token in tokenizer_config.json",
                f"must be one of the control pieces {', '.join(self.control_ids)}",
                got=repr(name),
                remedy="correct it there",
            )
        return named[name]

    def _required_id(self, role: str, default: int) -> int:
        if (found := self._named_id(role, default)) is None:
            remedy = f"name one as {role}_token in tokenizer_config.json"
            raise UserError(f"{self._where}:", f"must have a {role} token", got="none", remedy=remedy)
        return found

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer folder, or its model file.

        Raises:
            UserError: nothing there, a corrupt model, or one that cannot be imported. It names the command
                that makes one.
        """
        path = Path(path)
        folder, file = (path, path / MODEL_FILE) if path.is_dir() else (path.parent, path)
        if not file.is_file():
            raise _no_model(path, folder)
        model, surroundings = file.read_bytes(), tokenizer_files.read_surroundings(folder)
        expected, got = surroundings.fingerprint, hashlib.sha256(model).hexdigest()
        if expected not in (None, got):
            raise UserError(
                f"{file}: SHA-256",
                f"must be {expected} (see tokenizer_config.json)",
                got=f"{got}: the file is corrupt or was replaced",
                remedy=f"copy it again, or {_MAKE_ONE}",
            )
        return cls(model, where=str(file), surroundings=surroundings)

    def with_chat_template(self, template: str | None) -> "Tokenizer":
        """A copy that carries another Jinja chat template, or none."""
        other = copy.copy(self)
        other.chat_template = template
        return other

    def with_files_of(self, folder: str | Path) -> "Tokenizer":
        """The same pieces with the files in another folder beside them: its tokens and chat template.

        Raises UserError as `load`, and if they are of another tokenizer.
        """
        surroundings = tokenizer_files.read_surroundings(Path(folder))
        if surroundings.fingerprint not in (None, self.fingerprint):
            expectation = f"must belong to the tokenizer {self._where}, of fingerprint {self.fingerprint}"
            raise UserError(f"{folder}: tokenizer_config.json", expectation, got=surroundings.fingerprint)
        return Tokenizer(self._model, where=str(folder), surroundings=surroundings)

    def control_id(self, piece: str) -> int | None:
        """The id of a control piece such as "<|im_start|>", None where there is no such piece."""
        return self.control_ids.get(piece)

    def encode(self, text: str, continues: bool = False) -> list[int]:
        """Token ids of a text, never a special id, without BOS.

        Args:
            continues: the text follows other tokens. Only imported tokenizers differ then: they put a space
                before a text that stands alone.

        Raises:
            UserError: the text holds a lone surrogate; names its place.
        """
        return self.encode_utf8(utf8(text), continues)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them. Raises UserError with a lone surrogate's place."""
        return [self.encode_utf8(utf8(text)) for text in texts]

    def encode_utf8(self, data: bytes, continues: bool = False) -> list[int]:
        """Token ids of valid UTF-8, as `encode` gives them for the text."""
        if data and not continues:
            data = self._prefix + data
        if _SPACE not in data:
            return self._processor.encode(data)
        spelt = [self._byte_ids[bytes([byte])] for byte in _SPACE]
        ids: list[
            int
        ] = []  # SentencePiece would give U+2581 back as a space, so it goes in as its three bytes
        for index, part in enumerate(data.split(_SPACE)):
            ids += (spelt if index else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int], continues: bool = False) -> str:
        """The text of token ids. Special ids stand for nothing, bytes that are not UTF-8 become U+FFFD.

        Args:
            continues: the ids follow others, as a model's answer follows its prompt. Their first space then
                belongs to them.

        Raises:
            UserError: an id outside [0, vocab_size).
        """
        data = b"".join(map(self.piece_bytes, ids))
        return (data if continues else data.removeprefix(self._prefix)).decode("utf-8", errors="replace")

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes of a token, possibly part of a character. Raises UserError for an impossible id."""
        if not 0 <= token_id < self.vocab_size:
            got = f"{token_id}: was it made by another tokenizer?"
            raise UserError("a token id", f"must be between 0 and {self.vocab_size - 1}", got=got)
        return self._bytes[token_id]

    def save(self, folder: str | Path) -> None:
        """Write the model and what transformers needs beside it into `folder`, which may hold other files.

        Imported tokenizer files are copied unchanged. A different chat template replaces only the template.

        Raises:
            UserError: `folder` holds another tokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / MODEL_FILE
        if file.exists() and (other := hashlib.sha256(file.read_bytes()).hexdigest()) != self.fingerprint:
            fingerprints = f"fingerprint {other}, to be saved {self.fingerprint}"
            subject = f"{folder}: holds another tokenizer ({fingerprints})"
            raise UserError(subject, remedy="choose another folder")
        file.write_bytes(self._model)
        if self.chat_template is not None:
            (folder / tokenizer_files.TEMPLATE_FILE).write_text(self.chat_template, encoding="utf-8")
        if not self._is_own:
            for name, data in self._surroundings.files_with(self.chat_template).items():
                (folder / name).write_bytes(data)
            return
        twin = tokenizer_files.transformers_tokenizer(self._pieces, SPECIAL_PIECES, FIRST_LEARNED_ID)
        (folder / "tokenizer.json").write_text(json.dumps(twin, ensure_ascii=False), encoding="utf-8")
        write_json(folder / "tokenizer_config.json", tokenizer_files.transformers_config(self.fingerprint))


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


def _no_model(path: Path, folder: Path) -> UserError:
    if (folder / "tokenizer.json").is_file():
        got = "tokenizer.json alone"
        remedy = "only SentencePiece tokenizers can be imported"
        return UserError(f"{path}:", f"must hold a {MODEL_FILE}", got=got, remedy=remedy)
    what = f"the folder holds no {MODEL_FILE}" if path.is_dir() else "there is no such file or folder"
    expectation = f"must be a tokenizer folder or its {MODEL_FILE}, but {what}"
    return UserError(f"{path}:", expectation, remedy=_MAKE_ONE)


def _is_of_the_recipe(
    model: sentencepiece.SentencePieceProcessor, pieces: Sequence[str], surroundings: Surroundings
) -> bool:
    """Whether Lumi made the model and nobody changed the files beside it, so that they can be made again."""
    byte_ids = [i for i in range(len(pieces)) if model.is_byte(i)]
    return (
        tuple(pieces[:FIRST_BYTE_ID]) == SPECIAL_PIECES
        and model.is_unknown(UNK_ID)
        and all(model.is_control(i) for i in range(1, FIRST_BYTE_ID))
        and byte_ids == list(range(FIRST_BYTE_ID, FIRST_LEARNED_ID))
        and surroundings.names.items() <= {"bos": "<s>", "eos": "</s>", "pad": "<pad>"}.items()
        and surroundings.added.keys() <= set(SPECIAL_PIECES)
    )


def _control_ids(
    model: sentencepiece.SentencePieceProcessor, pieces: Sequence[str], added: dict[str, int], where: str
) -> dict[str, int]:
    """The control pieces of the model, and those that the files beside it add after its pieces."""
    ids = {piece: i for i, piece in enumerate(pieces) if model.is_control(i)}
    size = len(pieces)
    beyond = {name: i for name, i in added.items() if not (0 <= i < size and pieces[i] == name)}
    follow_on = sorted(beyond.values()) == list(range(size, size + len(beyond)))
    if not follow_on or beyond.keys() & set(pieces):
        raise UserError(
            f"{where}: tokens that the files beside it add",
            f"must have the ids from {size} on, without a gap, and new names",
            got=beyond,
            remedy="remove them from tokenizer_config.json and added_tokens.json "
            "if the model does not need them",
        )
    return ids | beyond


def _bytes_of(model: sentencepiece.SentencePieceProcessor, token_id: int, piece: str) -> bytes:
    if model.is_unknown(token_id) or model.is_control(token_id):
        return b""
    if model.is_byte(token_id):  # "<0x0A>"
        return bytes([int(piece[3:-1], 16)])
    return piece.replace("▁", " ").encode()


def _load_processor(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
        loaded = processor.vocab_size() > 0
    except RuntimeError:
        loaded = False
    if not loaded:
        raise UserError(f"{where}:", "must be a SentencePiece model, but cannot be parsed", remedy=_MAKE_ONE)
    return processor
