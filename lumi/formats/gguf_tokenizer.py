"""GGUF metadata -> the tokenizer, as the `tokenizer.json` that encodes as llama.cpp does."""

import json
from typing import Any

from lumi.config import UserError
from lumi.formats.gguf_file import GgufFile
from lumi.formats.gguf_vocabulary import (
    BYTE,
    CHAT_TEMPLATE,
    CONTROL,
    END_KEYS,
    KEY,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
)
from lumi.formats.gguf_words import words_of
from lumi.tokenizer.files import (
    CONFIG_FILE,
    JSON_FILE,
    READS_JSON,
    Surroundings,
    added_token,
    bos_before_each_text,
    transformers_tokenizer,
)
from lumi.tokenizer.hugging_face import HuggingFaceTokenizer
from lumi.tokenizer.tokenizer import Tokenizer

_ROLES = {"bos": "bos_token_id", "eos": "eos_token_id", "pad": "padding_token_id", "unk": "unknown_token_id"}


def read_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer in a file.

    Raises:
        UserError: metadata are missing or contradict each other, or ask for what our tokenizers do not do.
    """
    tokens, types = file.list(f"{KEY}tokens", str), file.list(f"{KEY}token_type", int)
    if len(tokens) != len(types) or len(set(tokens)) != len(tokens):
        expectation = "must name each token once and give its type"
        got = f"{len(tokens)} tokens of {len(set(tokens))} names and {len(types)} types"
        raise UserError(f"{file.path}: {KEY}tokens", expectation, got=got)
    size = max((token_id + 1 for token_id, kind in enumerate(types) if kind != UNUSED), default=0)
    tokens, types = tokens[:size], types[:size]  # what pads a vocabulary
    kind = file.value(f"{KEY}model", str)
    found = {role: _id(file, key, size) for role, key in _ROLES.items()}
    roles = {role: token_id for role, token_id in found.items() if token_id is not None}
    if kind == "gpt2":
        data = _byte_level(file, tokens, types, roles)
    elif kind == "llama":
        data = _sentencepiece(file, tokens, types, roles)
    else:
        raise UserError(f"{file.path}: {KEY}model", "must be llama or gpt2", got=repr(kind)[:60])
    if file.value(f"{KEY}add_eos_token", bool, False):
        raise UserError(f"{file.path}: {KEY}add_eos_token", "must not be set", got="true")
    ends = [_id(file, key, size) for key in END_KEYS]
    names = {role: tokens[token_id] for role, token_id in roles.items()}
    template = file.value(CHAT_TEMPLATE, str, "") or None
    config = {"tokenizer_class": READS_JSON, **{f"{role}_token": name for role, name in names.items()}}
    surroundings = Surroundings(
        files={CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False).encode()},
        config=config,
        names=names,
        ends=tuple(token_id for token_id in ends if token_id is not None),
        chat_template=template,
    )
    files = {JSON_FILE: json.dumps(data, ensure_ascii=False).encode()}
    return HuggingFaceTokenizer(data, surroundings, files, str(file.path))


def _id(file: GgufFile, key: str, size: int) -> int | None:
    """The id of a token with a role; None where there is none."""
    if f"{KEY}{key}" not in file.metadata:
        return None
    if not 0 <= (token_id := file.value(f"{KEY}{key}", int)) < size:
        raise UserError(f"{file.path}: {KEY}{key}", f"must be an id below {size}", got=token_id)
    return token_id


def _bos_id(file: GgufFile, roles: dict[str, int], default: bool) -> int | None:
    """What stands before a text."""
    if not file.value(f"{KEY}add_bos_token", bool, default):
        return None
    if "bos" not in roles:
        raise UserError(f"{file.path}: {KEY}bos_token_id is missing, though {KEY}add_bos_token is set")
    return roles["bos"]


def _added(tokens: list[str], types: list[int]) -> list[dict[str, Any]]:
    kinds = (CONTROL, UNKNOWN, USER_DEFINED)
    special = ((token_id, kind) for token_id, kind in enumerate(types) if kind in kinds)
    return [
        added_token(token_id, tokens[token_id], special=kind != USER_DEFINED) for token_id, kind in special
    ]


def _sentencepiece(
    file: GgufFile, tokens: list[str], types: list[int], roles: dict[str, int]
) -> dict[str, Any]:
    scores = file.list(f"{KEY}scores", float)[: len(tokens)]
    learned = [token_id for token_id, kind in enumerate(types) if kind == NORMAL]
    if len(scores) < len(tokens) or types.count(BYTE) < 256 or "unk" not in roles:
        expectation = "must be of SentencePiece, with scores, an unknown token and 256 byte tokens"
        raise UserError(f"{file.path}: the vocabulary", expectation, got="another one")
    if any(scores[token_id] % 1 for token_id in learned):  # BPE numbers its merges
        raise UserError(f"{file.path}: {KEY}scores", "must be those of BPE", got="those of a unigram model")
    learned.sort(key=lambda token_id: -scores[token_id])
    data = transformers_tokenizer(
        tokens,
        (),
        learned,
        unk_id=roles["unk"],
        bos_id=_bos_id(file, roles, default=True),
        prepend_scheme="always" if file.value(f"{KEY}add_space_prefix", bool, True) else "never",
    )
    data["added_tokens"] = _added(tokens, types)
    data["model"]["vocab"] = _vocab(tokens, types)
    return data


def _vocab(tokens: list[str], types: list[int]) -> dict[str, int]:
    return {tokens[token_id]: token_id for token_id, kind in enumerate(types) if kind != UNUSED}


def _byte_level(file: GgufFile, tokens: list[str], types: list[int], roles: dict[str, int]) -> dict[str, Any]:
    words = words_of(file.value(f"{KEY}pre", str), str(file.path))
    merges = [
        (merge[:1] + merge[1:].partition(" ")[0], merge[1:].partition(" ")[2])
        for merge in file.list(f"{KEY}merges", str)
    ]
    default = file.value(f"{KEY}pre", str) in ("llama-bpe", "llama3", "llama-v3", "tekken")  # llama.cpp's
    bos_id = _bos_id(file, roles, default)
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added(tokens, types),
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": words.steps},
        "post_processor": None if bos_id is None else bos_before_each_text(bos_id, tokens[bos_id]),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": words.ignores_merges,
            "vocab": _vocab(tokens, types),
            "merges": merges,
        },
    }
