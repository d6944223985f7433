"""Lumi's own tokenizers: SentencePiece BPE with byte fallback.

Sennrich et al. 2016, arXiv:1508.07909; Kudo and Richardson 2018, arXiv:1808.06226. SentencePiece,
transformers' LlamaTokenizer and llama.cpp agree on the ids of the recipe here.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

from lumi.chat.token_writer import Follows
from lumi.config import UserError, write_json
from lumi.tokenizer import files as tokenizer_files
from lumi.tokenizer.files import (
    JSON_FILE,
    MODEL_FILE,
    Surroundings,
    json_fingerprint,
    spaces,
    write_tokenizer,
)
from lumi.tokenizer.tokenizer import PROBE, Description, Tokenizer

# The recipe: ids 0 to 5, then the 256 bytes, then what was learned.
SPECIAL_PIECES = ("<unk>", "<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
UNK_ID, BOS_ID, EOS_ID, PAD_ID, IM_START_ID, IM_END_ID = range(6)
FIRST_BYTE_ID = len(SPECIAL_PIECES)
FIRST_LEARNED_ID = FIRST_BYTE_ID + 256
_NAMES = {"unk": "<unk>", "bos": "<s>", "eos": "</s>", "pad": "<pad>"}

SPACE = "▁"  # U+2581, which SentencePiece writes for a space


class SentencePieceTokenizer(Tokenizer):
    """A model of the recipe. `decode(encode(text)) == text` for every text; the fingerprint is the SHA-256 of
    the model's bytes.

    Args:
        model: the bytes of `tokenizer.model`.
        surroundings: None: the tokenizer is new, and gets ChatML's template.
    """

    def __init__(self, model: bytes, surroundings: Surroundings | None = None) -> None:
        self._model, self._processor = model, load_processor(model)
        pieces = pieces_of(self._processor)
        self._pieces = pieces
        super().__init__([bytes_of(self._processor, i, piece) for i, piece in enumerate(pieces)])
        self.unk_id, self.bos_id, self.eos_id, self.pad_id = UNK_ID, BOS_ID, EOS_ID, PAD_ID
        self.begin_ids = (BOS_ID,)
        self.control_ids = {piece: i for i, piece in enumerate(SPECIAL_PIECES) if i != UNK_ID}
        self.fingerprint = hashlib.sha256(model).hexdigest()
        if self.decode(self.encode(PROBE)) != PROBE:
            expectation = "must be a model that keeps every text as it is, but it normalises"
            raise UserError(f"{MODEL_FILE}:", expectation, remedy=tokenizer_files.MAKE_ONE)
        self.eos_ids, self.chat_template = (EOS_ID,), tokenizer_files.CHAT_TEMPLATE
        if surroundings is not None:
            self.eos_ids = surroundings.eos_ids(EOS_ID)
            self.chat_template = surroundings.chat_template

    def encode_utf8(self, data: bytes, follows: Follows = "nothing") -> list[int]:
        """As in `Tokenizer`. No space is put before a text, whatever it follows."""
        space = SPACE.encode()
        if space not in data:
            return self._processor.encode(data)
        # SentencePiece would give U+2581 back as a space, so it goes in as its three bytes.
        spelt = [FIRST_BYTE_ID + byte for byte in space]
        ids: list[int] = []
        for index, part in enumerate(data.split(space)):
            ids += (spelt if index else []) + self._processor.encode(part)
        return ids

    def describe(self) -> Description:
        """As in `Tokenizer`: the same merges."""
        learned = range(FIRST_LEARNED_ID, len(self._pieces))
        twin = tokenizer_files.transformers_tokenizer(
            self._pieces, range(FIRST_BYTE_ID), learned, unk_id=UNK_ID, bos_id=BOS_ID
        )
        return Description(twin, "never", spells_spaces=True)

    def save(self, folder: str | Path) -> None:
        """As in `Tokenizer`: `tokenizer.model`, and the same merges as `tokenizer.json`."""
        twin = self.describe().data
        files = {MODEL_FILE: self._model, JSON_FILE: json.dumps(twin, ensure_ascii=False).encode()}
        write_tokenizer(Path(folder), files, self.chat_template)
        config = tokenizer_files.transformers_config(self.fingerprint)
        steps, special = (
            {"normalizer": None, "pre_tokenizer": spaces("never")},
            tuple(enumerate(SPECIAL_PIECES)),
        )
        as_read = json_fingerprint(twin["model"], steps, special, "never", self.begin_ids)
        config[tokenizer_files.TWIN_FINGERPRINT_KEY] = as_read
        write_json(Path(folder) / tokenizer_files.CONFIG_FILE, config)


def is_of_the_recipe(model: bytes, surroundings: Surroundings, where: str) -> bool:
    """Whether Lumi made the model and nobody changed the files beside it, so that they can be made again."""
    processor = load_processor(model, where)
    pieces = pieces_of(processor)
    byte_ids = [i for i in range(len(pieces)) if processor.is_byte(i)]
    return (
        tuple(pieces[:FIRST_BYTE_ID]) == SPECIAL_PIECES
        and processor.is_unknown(UNK_ID)
        and all(processor.is_control(i) for i in range(1, FIRST_BYTE_ID))
        and byte_ids == list(range(FIRST_BYTE_ID, FIRST_LEARNED_ID))
        and not puts_a_space_first(processor)
        and surroundings.names.items() <= _NAMES.items()
        and {*surroundings.added, *surroundings.extra} <= set(SPECIAL_PIECES)
    )


def load_processor(model: bytes, where: str = "tokenizer") -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own reader of a model. Raises UserError for other bytes."""
    processor = sentencepiece.SentencePieceProcessor()
    try:
        processor.load_from_serialized_proto(model)
        loaded = processor.vocab_size() > 0
    except RuntimeError:
        loaded = False
    if not loaded:
        raise UserError(
            f"{where}:",
            "must be a SentencePiece model, but cannot be parsed",
            remedy=tokenizer_files.MAKE_ONE,
        )
    return processor


def pieces_of(model: sentencepiece.SentencePieceProcessor) -> Sequence[str]:
    """The pieces by id."""
    return [model.id_to_piece(i) for i in range(model.vocab_size())]


def puts_a_space_first(model: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether the model puts a space before a text, as that of Llama 2 does."""
    return model.normalize("a") != "a"


def bytes_of(model: sentencepiece.SentencePieceProcessor, token_id: int, piece: str) -> bytes:
    """The bytes that a piece stands for; none for the unknown and control pieces."""
    if model.is_unknown(token_id) or model.is_control(token_id):
        return b""
    if model.is_byte(token_id):  # "<0x0A>"
        return bytes([int(piece[3:-1], 16)])
    return piece.replace(SPACE, " ").encode()
