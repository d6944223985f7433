"""Stage 2: text <-> token ids. SentencePiece BPE with byte fallback (Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018,
arXiv:1808.06226), in the recipe that SentencePiece, transformers' LlamaTokenizer and llama.cpp all read the same way."""

import codecs
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from lumi import tokenizer_files
from lumi.config import UserError, read_json, write_json

MODEL_FILE = "tokenizer.model"
TRAIN_COMMAND = "lumi tokenizer --config configs/tokenizer/32k.json --corpus-dirs CORPUS --output-dir TOKENIZER"

SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")  # ids 0 to 5
UNK_ID, BOS_ID, EOS_ID, PAD_ID, IM_START_ID, IM_END_ID = range(6)
FIRST_BYTE_ID = len(SPECIAL_PIECES)
FIRST_LEARNED_ID = FIRST_BYTE_ID + 256

_SPACE = "▁".encode()  # U+2581, as which SentencePiece sees a space
_SPACE_IDS = [FIRST_BYTE_ID + byte for byte in _SPACE]


class Tokenizer:
    """Text <-> token ids; `decode(encode(text)) == text` for every text.

    `encode` takes plain text: "<s>" or "<|im_start|>" in it is spelt out like any other characters, and control ids come only from
    code that asks for them. (transformers' tokenizers, by design, do read such markers out of the text.)

    Attributes:
        vocab_size: number of token ids.
        bos_id, eos_id, pad_id, unk_id, im_start_id, im_end_id: the special ids, all different.
        fingerprint: SHA-256 of the model's bytes, in hexadecimal.
        token_bytes: (vocab_size,) int32, UTF-8 bytes that each token stands for; 0 for special ids.
        chat_template: the Jinja template that is saved beside the model.
    """

    bos_id, eos_id, pad_id, unk_id, im_start_id, im_end_id = BOS_ID, EOS_ID, PAD_ID, UNK_ID, IM_START_ID, IM_END_ID

    def __init__(self, model: bytes, *, where: str = "tokenizer", chat_template: str = tokenizer_files.CHAT_TEMPLATE):
        self._model, self._where, self.chat_template = model, where, chat_template
        self._processor = _load_processor(model, where)
        self.vocab_size = self._processor.vocab_size()
        self.fingerprint = hashlib.sha256(model).hexdigest()
        self._pieces = [self._processor.id_to_piece(i) for i in range(self.vocab_size)]
        learned = (piece.replace("▁", " ").encode() for piece in self._pieces[FIRST_LEARNED_ID:])
        self._bytes = [b"" for _ in SPECIAL_PIECES] + [bytes([byte]) for byte in range(256)] + list(learned)
        self.token_bytes = np.array([len(data) for data in self._bytes], dtype=np.int32)
        if not self._is_of_the_recipe():
            raise UserError(
                f"{where}: must be a tokenizer of Lumi's recipe (first pieces {' '.join(SPECIAL_PIECES)}, then 256 bytes; spaces kept), "
                f"got first pieces {' '.join(self._pieces[:FIRST_BYTE_ID])}; make a tokenizer with `{TRAIN_COMMAND}`"
            )

    def _is_of_the_recipe(self) -> bool:
        model, probe = self._processor, "  a\tb \n\n é 12 "
        return (
            self._pieces[:FIRST_BYTE_ID] == list(SPECIAL_PIECES)
            and model.is_unknown(UNK_ID)
            and all(model.is_control(i) for i in range(1, FIRST_BYTE_ID))
            and [i for i in range(self.vocab_size) if model.is_byte(i)] == list(range(FIRST_BYTE_ID, FIRST_LEARNED_ID))
            and self.decode(self.encode(probe)) == probe
        )

    @classmethod
    def load(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer folder, or its model file.

        Raises:
            UserError: nothing there, a corrupt model, a model of another recipe; says which command makes a tokenizer.
        """
        path = Path(path)
        folder, file = (path, path / MODEL_FILE) if path.is_dir() else (path.parent, path)
        if not file.is_file():
            what = f"the folder holds no {MODEL_FILE}" if path.is_dir() else "there is no such file or folder"
            raise UserError(f"{path}: must be a tokenizer folder or its {MODEL_FILE}, but {what}; make one with `{TRAIN_COMMAND}`")
        model = file.read_bytes()
        config_file, template_file = folder / "tokenizer_config.json", folder / "chat_template.jinja"
        config = read_json(config_file) if config_file.is_file() else {}
        expected = config.get(tokenizer_files.FINGERPRINT_KEY) if isinstance(config, dict) else None
        if expected is not None and expected != (got := hashlib.sha256(model).hexdigest()):
            raise UserError(
                f"{file}: SHA-256 must be {expected} (see {config_file.name}), got {got}: the file is corrupt or was replaced; "
                f"copy it again, or make a tokenizer with `{TRAIN_COMMAND}`"
            )
        template = template_file.read_text(encoding="utf-8") if template_file.is_file() else tokenizer_files.CHAT_TEMPLATE
        return cls(model, where=str(file), chat_template=template)

    def encode(self, text: str) -> list[int]:
        """Token ids of a text; never a special id, no BOS. Raises UserError naming the place of a lone surrogate."""
        return self.encode_utf8(utf8(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, as `encode` gives them. Raises UserError naming the place of a lone surrogate."""
        return [self.encode_utf8(utf8(text)) for text in texts]

    def encode_utf8(self, data: bytes) -> list[int]:
        """Token ids of valid UTF-8, as `encode` gives them for the text."""
        if _SPACE not in data:
            return self._processor.encode(data)
        ids: list[int] = []  # SentencePiece would give U+2581 back as a space, so it goes in as its three bytes
        for index, part in enumerate(data.split(_SPACE)):
            ids += (_SPACE_IDS if index else []) + self._processor.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids; special ids stand for nothing, and bytes that are not UTF-8 become U+FFFD.

        Raises:
            UserError: an id outside [0, vocab_size).
        """
        return b"".join(map(self.piece_bytes, ids)).decode("utf-8", errors="replace")

    def piece_bytes(self, token_id: int) -> bytes:
        """The bytes that one token stands for, possibly a part of a character. Raises UserError for an id outside [0, vocab_size)."""
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"a token id must be between 0 and {self.vocab_size - 1}, got {token_id}: was it made by another tokenizer?")
        return self._bytes[token_id]

    def save(self, folder: str | Path) -> None:
        """Write the model and what transformers needs beside it into `folder`, which may hold other files (a run's `final/`).

        Raises:
            UserError: `folder` holds another tokenizer.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / MODEL_FILE
        if file.exists() and (other := hashlib.sha256(file.read_bytes()).hexdigest()) != self.fingerprint:
            raise UserError(
                f"{folder}: holds another tokenizer (fingerprint {other}, to be saved {self.fingerprint}); choose another folder"
            )
        file.write_bytes(self._model)
        (folder / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8")
        compact = json.dumps(tokenizer_files.transformers_tokenizer(self._pieces, SPECIAL_PIECES, FIRST_LEARNED_ID), ensure_ascii=False)
        (folder / "tokenizer.json").write_text(compact, encoding="utf-8")
        write_json(folder / "tokenizer_config.json", tokenizer_files.transformers_config(self.fingerprint))


class StreamDecoder:
    """Decodes ids one by one: what `feed` and `flush` return, joined, is `tokenizer.decode` of all the ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token_id: int) -> str:
        """The whole characters that this token completes; possibly none."""
        return self._decoder.decode(self._tokenizer.piece_bytes(token_id))

    def flush(self) -> str:
        """U+FFFD if the ids ended inside a character, otherwise nothing; the decoder then starts anew."""
        return self._decoder.decode(b"", final=True)


def _load_processor(model: bytes, where: str) -> sentencepiece.SentencePieceProcessor:
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
        loaded = processor.vocab_size() > 0
    except RuntimeError:
        loaded = False
    if not loaded:
        raise UserError(f"{where}: must be a SentencePiece model, but cannot be parsed; make a tokenizer with `{TRAIN_COMMAND}`")
    return processor


def utf8(text: str) -> bytes:
    """A text in UTF-8. Raises UserError naming the place of a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text must be valid Unicode, got the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error
