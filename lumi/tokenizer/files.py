"""The files of a tokenizer, so that others read it as Lumi does: transformers' JSON, the card.

transformers reads SentencePiece models only where `protobuf` is installed. `tokenizer.json` holds the same
merges for everyone else.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lumi.chat.templates import TEMPLATES
from lumi.config import UserError, read_json

MODEL_FILE, JSON_FILE = "tokenizer.model", "tokenizer.json"
CONFIG_FILE, TEMPLATE_FILE, GENERATION_FILE = (
    "tokenizer_config.json",
    "chat_template.jinja",
    "generation_config.json",
)
# In tokenizer_config.json, where transformers keeps unknown keys: the fingerprint of `tokenizer.model`, and
# that of `tokenizer.json` beside it, which is what is left when transformers has saved the folder again.
FINGERPRINT_KEY, TWIN_FINGERPRINT_KEY = "lumi_fingerprint", "lumi_json_fingerprint"
MAKE_ONE = (
    "make a tokenizer with `lumi tokenizer --config configs/tokenizer/32k.json --corpus-dirs CORPUS "
    "--output-dir TOKENIZER`"
)

CHAT_TEMPLATE = TEMPLATES["chatml"].jinja

READS_JSON = "PreTrainedTokenizerFast"  # transformers' class that takes `tokenizer.json` as it is

_KEPT_FILES = (CONFIG_FILE, "special_tokens_map.json", "added_tokens.json")
_ROLES = ("bos", "eos", "pad", "unk")
_MODEL_SETTINGS = ("ignore_merges", "byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")


@dataclass(frozen=True)
class Surroundings:
    """The files beside somebody's tokenizer, and what they say.

    Attributes:
        files: their bytes, by name.
        config: what `tokenizer_config.json` holds.
        names: the names of "bos", "eos", "pad" and "unk".
        added: ids of tokens that they add, by name.
        extra: names of further special tokens.
        ends: ids that end a text by `generation_config.json`.
        chat_template: Jinja text.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    names: dict[str, str] = field(default_factory=dict)
    added: dict[str, int] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    ends: tuple[int, ...] = ()
    chat_template: str | None = None

    def eos_ids(self, eos_id: int) -> tuple[int, ...]:
        """All ids that end a text, the tokenizer's own first."""
        return tuple(dict.fromkeys((eos_id, *self.ends)))

    def llama_scheme(self) -> str | None:
        """How transformers' LlamaTokenizer puts a space before a text, in the words of `Metaspace`. None: the
        tokenizer is of another class."""
        if str(self.config.get("tokenizer_class")).removesuffix("Fast") != "LlamaTokenizer":
            return None
        if self.config.get("add_prefix_space") not in (None, True):
            return "never"
        return "always" if self.config.get("legacy", False) else "first"

    def files_with(self, chat_template: str | None) -> dict[str, bytes]:
        """The files unchanged, except that a different template in `tokenizer_config.json` is removed."""
        if _template_in(self.config) in (None, chat_template):
            return self.files
        config = {key: value for key, value in self.config.items() if key != "chat_template"}
        return self.files | {CONFIG_FILE: json.dumps(config, indent=2, ensure_ascii=False).encode()}


def read_surroundings(folder: Path) -> Surroundings:
    """Read the files beside a tokenizer. Raises UserError if one is not as transformers writes it."""
    files = {name: (folder / name).read_bytes() for name in _KEPT_FILES if (folder / name).is_file()}
    config, special, added = (_read_object(folder / name) for name in _KEPT_FILES)
    for key, token in _object(config.get("added_tokens_decoder", {}), folder / CONFIG_FILE).items():
        name = _content(token)
        added[name if _is_name(name) else ""] = int(key) if key.isdecimal() else key
    for name, number in added.items():
        if not _is_name(name) or type(number) is not int:
            got, remedy = f"{name!r}: {number!r}", "correct its JSON files"
            raise UserError(f"{folder}: an added token", "must be a name and an id", got=got, remedy=remedy)
    names = {}
    for role in _ROLES:
        token = _content(config.get(f"{role}_token", special.get(f"{role}_token")))
        if token is not None and not _is_name(token):
            expectation, remedy = "must be the name of a token", "correct its JSON files"
            raise UserError(f"{folder}: {role}_token", expectation, got=repr(token)[:60], remedy=remedy)
        if token is not None:
            names[role] = token
    file = folder / TEMPLATE_FILE
    template = file.read_text(encoding="utf-8") if file.is_file() else _template_in(config)
    extra = dict.fromkeys((*_extra_tokens(config), *_extra_tokens(special)))
    return Surroundings(files, config, names, added, tuple(extra), read_ends(folder), template)


def _is_name(token: Any) -> bool:
    return isinstance(token, str) and token != "" and token.isprintable() | token.isascii()


def _extra_tokens(config: dict[str, Any]) -> list[str]:
    """Special tokens without a role, as transformers 4 and 5 write them: a list, or an object by role."""
    names: list[str] = []
    for key in ("extra_special_tokens", "additional_special_tokens"):
        listed = config.get(key) or []
        tokens = list(listed.values()) if isinstance(listed, dict) else listed
        if not isinstance(tokens, list) or not all(_is_name(_content(token)) for token in tokens):
            remedy = "correct its JSON files"
            raise UserError(
                f"{key}", "must be a list of names of tokens", got=repr(listed)[:60], remedy=remedy
            )
        names += map(_content, tokens)
    return names


def read_ends(folder: Path) -> tuple[int, ...]:
    """The ids that end a text by a model's `generation_config.json`: one, several or none."""
    listed = _read_object(folder / GENERATION_FILE).get("eos_token_id")
    ends = listed if isinstance(listed, list) else [] if listed is None else [listed]
    if not all(type(end) is int and end >= 0 for end in ends):
        raise UserError(
            f"{folder / GENERATION_FILE}: eos_token_id", "must be an id or a list of ids", got=listed
        )
    return tuple(ends)


def write_tokenizer(folder: Path, files: dict[str, bytes], chat_template: str | None) -> None:
    """Write a tokenizer's files. Raises UserError if `folder` holds another tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in (MODEL_FILE, JSON_FILE):
        if (folder / name).exists() and (folder / name).read_bytes() != files.get(name):
            raise UserError(f"{folder}: holds another tokenizer", remedy="choose another folder")
    for name, data in files.items():
        (folder / name).write_bytes(data)
    if chat_template is not None:
        (folder / TEMPLATE_FILE).write_text(chat_template, encoding="utf-8")


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
    """`tokenizer_config.json`: transformers then takes `tokenizer.json` as it is.

    With the class LlamaTokenizer, transformers 4 would make it from `tokenizer.model` again, where `protobuf`
    and `sentencepiece` are installed, and fail elsewhere. The flags are for who asks for that class by name:
    it then adds no space and cleans nothing up.
    """
    return {
        "tokenizer_class": READS_JSON,
        "unk_token": "<unk>",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "pad_token": "<pad>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],  # the name that transformers 4 knows too
        "add_bos_token": True,
        "add_eos_token": False,
        "add_prefix_space": False,
        "legacy": False,
        "clean_up_tokenization_spaces": False,
        FINGERPRINT_KEY: fingerprint,
    }


def transformers_tokenizer(
    pieces: Sequence[str],
    special: Sequence[int],
    learned: Iterable[int],
    *,
    unk_id: int,
    bos_id: int | None,
    prepend_scheme: str = "never",
) -> dict[str, Any]:
    """`tokenizer.json`: the model as a byte-fallback BPE of the `tokenizers` library.

    Args:
        pieces: SentencePiece's pieces by id, '▁' standing for a space.
        special: ids of the unknown and control pieces.
        learned: ids of the pieces that merges made, and join.
        bos_id: stands before every text; None: nothing does.
        prepend_scheme: whether a space is put before a text, in the words of `Metaspace`.
    """
    replace_space = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    decoders = [replace_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if prepend_scheme != "never":
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added_token(i, pieces[i]) for i in special],
        "normalizer": None,
        "pre_tokenizer": spaces(prepend_scheme),
        "post_processor": None if bos_id is None else bos_before_each_text(bos_id, pieces[bos_id]),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[unk_id],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": all_merges(pieces, learned),
        },
    }


def spaces(prepend_scheme: str) -> dict[str, Any]:
    """A pre-tokenizer that writes ▁ for a space and puts one before a text, as SentencePiece does.

    `Metaspace` alone puts none before a text that begins with a space. The one in the middle looks for
    another character there, and its space becomes ▁ in the last one.
    """
    plain = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "never", "split": False}
    if prepend_scheme == "never":
        return plain
    prepending = plain | {"replacement": " ", "prepend_scheme": prepend_scheme}
    return {"type": "Sequence", "pretokenizers": [plain, prepending, plain]}


def json_fingerprint(
    model: dict[str, Any],
    steps: dict[str, Any],
    added: Sequence[tuple[int, str]],
    scheme: str,
    begin_ids: Sequence[int],
) -> str:
    """SHA-256 of all in a `tokenizer.json` that decides the ids.

    It leaves out how others write the same: the settings of a control token, which matter only where one is
    read out of a text, and those that do not concern a model that spells every text.

    Args:
        model: what the file says of its BPE.
        steps: its `normalizer` and `pre_tokenizer`, but for what puts a space before a text.
        added: ids and names of the added tokens.
        scheme: when a space is put before a text, in the words of `Metaspace`.
        begin_ids: what stands before every text.
    """
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    settings = {key: model.get(key) or None for key in _MODEL_SETTINGS}
    decisive = [steps, settings, model["vocab"], merges, added, scheme, begin_ids]
    return hashlib.sha256(json.dumps(decisive, sort_keys=True, ensure_ascii=False).encode()).hexdigest()


def added_token(token_id: int, piece: str, *, special: bool = True) -> dict[str, Any]:
    """A token that is looked for before the merges, as `tokenizer.json` lists it."""
    return {
        "id": token_id,
        "content": piece,
        "special": special,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
    }


def bos_before_each_text(bos_id: int, bos: str) -> dict[str, Any]:
    """A post-processor that puts one token before a text."""
    first, second = (
        [{"SpecialToken": {"id": bos, "type_id": i}}, {"Sequence": {"id": text, "type_id": i}}]
        for i, text in enumerate("AB")
    )
    return {
        "type": "TemplateProcessing",
        "single": first,
        "pair": first + second,
        "special_tokens": {bos: {"id": bos, "ids": [bos_id], "tokens": [bos]}},
    }


def all_merges(pieces: Sequence[str], learned: Iterable[int]) -> list[tuple[str, str]]:
    """Every way to join two learned pieces into a third, in the order in which SentencePiece learned them."""
    ids = {pieces[i]: i for i in learned}
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
