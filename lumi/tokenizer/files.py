"""The files beside `tokenizer.model`, so that others read it as Lumi does: transformers' JSON, the card.

transformers reads SentencePiece models only where `protobuf` is installed. `tokenizer.json` holds the same
merges for everyone else.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumi.chat.templates import TEMPLATES
from lumi.config import UserError, read_json

CONFIG_FILE, TEMPLATE_FILE = "tokenizer_config.json", "chat_template.jinja"
FINGERPRINT_KEY = "lumi_fingerprint"  # in tokenizer_config.json, where transformers keeps unknown keys

CHAT_TEMPLATE = TEMPLATES["chatml"].jinja

_KEPT_FILES = (CONFIG_FILE, "tokenizer.json", "special_tokens_map.json", "added_tokens.json")


@dataclass(frozen=True)
class Surroundings:
    """The files beside somebody's `tokenizer.model`, and what they say.

    Attributes:
        files: their bytes, by name.
        names: the pieces of "bos", "eos" and "pad".
        added: ids of tokens that the model does not hold, by name.
        chat_template: Jinja text.
        fingerprint: the one that Lumi's own folders carry.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    chat_template: str | None = None
    fingerprint: str | None = None

    def files_with(self, chat_template: str | None) -> dict[str, bytes]:
        """The files unchanged, except that a different template in `tokenizer_config.json` is removed."""
        config = json.loads(self.files.get(CONFIG_FILE, b"{}"))
        if _template_in(config) in (None, chat_template):
            return self.files
        del config["chat_template"]
        return self.files | {CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False).encode()}


def read_surroundings(folder: Path) -> Surroundings:
    """Read the files beside a model. Raises UserError if one is not as transformers writes it."""
    files = {name: (folder / name).read_bytes() for name in _KEPT_FILES if (folder / name).is_file()}
    config, special, added = (
        _read_object(folder / name) for name in (CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")
    )
    for key, token in _object(config.get("added_tokens_decoder", {}), folder / CONFIG_FILE).items():
        added[_content(token)] = int(key) if key.isdecimal() else key
    for name, number in added.items():
        if not isinstance(name, str) or type(number) is not int:
            got, remedy = f"{name!r}: {number!r}", "correct its JSON files"
            raise UserError(f"{folder}: an added token", "must be a name and an id", got=got, remedy=remedy)
    names = {}
    for role in ("bos", "eos", "pad"):
        token = _content(config.get(f"{role}_token", special.get(f"{role}_token")))
        if isinstance(token, str):
            names[role] = token
    file = folder / TEMPLATE_FILE
    template = file.read_text(encoding="utf-8") if file.is_file() else _template_in(config)
    return Surroundings(files, names, added, template, config.get(FINGERPRINT_KEY))


def _read_object(path: Path) -> dict[str, Any]:
    return _object(read_json(path), path) if path.is_file() else {}


def _object(value: Any, path: Path) -> dict[str, Any]:
    if not isinstance(value, dict):
        got = json.dumps(value)[:60]
        raise UserError(f"{path}:", "must hold a JSON object", got=got, remedy="copy the file again")
    return value


def _content(token: Any) -> Any:
    """A token's text. transformers writes the bare text, or an object with its settings."""
    return token.get("content") if isinstance(token, dict) else token


def _template_in(config: dict[str, Any]) -> str | None:
    """The chat template in `tokenizer_config.json`: a text, or the default one of several."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [item for item in template if isinstance(item, dict)]
        defaults = [item.get("template") for item in named if item.get("name") == "default"]
        template = defaults[0] if defaults else None
    return template if isinstance(template, str) else None


def transformers_config(fingerprint: str) -> dict[str, Any]:
    """`tokenizer_config.json`: transformers' LlamaTokenizer then adds no space and cleans nothing up."""
    return {
        "tokenizer_class": "LlamaTokenizer",
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "extra_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        FINGERPRINT_KEY: fingerprint,
    }


def transformers_tokenizer(
    pieces: Sequence[str], special: Sequence[str], first_normal: int
) -> dict[str, Any]:
    """`tokenizer.json`: the model as a byte-fallback BPE of the `tokenizers` library.

    Args:
        pieces: SentencePiece's pieces by id, '▁' standing for a space.
        special: the unknown and control pieces, ids 0 to len(special) - 1.
        first_normal: id of the first learned piece. Merges join learned pieces alone.
    """
    replace_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_special_token(i, piece) for i, piece in enumerate(special)],
        "normalizer": None,
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False},
        "post_processor": _bos_before_each_text(special.index("<s>")),
        "decoder": {
            "type": "Sequence",
            "decoders": [replace_space, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(pieces, first_normal),
        },
    }


def _special_token(token_id: int, piece: str) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": piece,
        "special": True,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }


def _bos_before_each_text(bos_id: int) -> dict[str, Any]:
    first, second = (
        [{"SpecialToken": {"id": "<s>", "type_id": i}}, {"Sequence": {"id": text, "type_id": i}}]
        for i, text in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {"<s>": {"id": "<s>", "ids": [bos_id], "tokens": ["<s>"]}},
    }


def _merges(pieces: Sequence[str], first_normal: int) -> list[tuple[str, str]]:
    """Every way to join two learned pieces into a third, in the order in which SentencePiece learned them."""
    ids = {piece: i for i, piece in enumerate(pieces) if i >= first_normal}
    merges = []
    for piece in ids:
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in ids and pair[1] in ids]
        merges += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def card(
    *,
    fingerprint: str,
    recipe: dict[str, Any],
    trained_on: Sequence[str],
    sampled_bytes: int,
    bytes_per_token: float,
) -> str:
    """The README.md of a tokenizer folder."""
    settings = "\n".join(f"| `{key}` | `{value}` |" for key, value in recipe.items())
    sources = "\n".join(f"- {source}" for source in trained_on)
    return f"""# Tokenizer

SentencePiece BPE with byte fallback, {recipe["vocab_size"]:,} pieces, made by `lumi tokenizer`.

- Fingerprint (SHA-256 of `tokenizer.model`): `{fingerprint}`
- {bytes_per_token:.2f} bytes of UTF-8 per token, on text that it was trained on
- Lossless: decoding gives back every text that was encoded, newlines and spaces included
- `<unk>` 0; `<s>` 1 begins and `</s>` 2 ends a document; `<pad>` 3; `<|im_start|>` 4 and `<|im_end|>` 5
  enclose a turn of a chat. These are control pieces: Lumi never reads them out of a user's text (transformers
  does, by design).

Trained on {sampled_bytes:,} bytes sampled from:

{sources}

| setting | value |
|---|---|
{settings}
"""
