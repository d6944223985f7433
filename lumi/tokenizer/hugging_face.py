"""Tokenizers of others: `tokenizer.json`, applied by the `tokenizers` library.

Byte-level BPE (GPT-2, Llama 3, Qwen, SmolLM2) and BPE with byte fallback (Llama 2, Mistral), with whatever
pre-tokenizer and normalizer the file names. The ids are those of transformers, but for two things: no control
token is read out of a text, and where a space is put before a text, it is put before every text, so that
decoding can take it off again (transformers adds none where the text begins with one).
"""

import copy
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Library

from lumi.chat.token_writer import Follows
from lumi.config import UserError
from lumi.host.text import utf8
from lumi.tokenizer.files import (
    FINGERPRINT_KEY,
    JSON_FILE,
    TWIN_FINGERPRINT_KEY,
    Surroundings,
    json_fingerprint,
    spaces,
    write_tokenizer,
)
from lumi.tokenizer.tokenizer import PROBE, Description, Tokenizer

_SPACE = "▁"  # U+2581, which byte-fallback vocabularies write for a space
_UTF8_BYTES = [byte for byte in range(0xF5) if byte not in (0xC0, 0xC1)]  # the others are in no text
_REFUSED = "this tokenizer cannot be imported"
# By Metaspace's scheme: what stands before a text that gets a space.
_PREFIXED: Mapping[str, frozenset[Follows]] = {
    "always": frozenset(("nothing", "control")),
    "first": frozenset(("nothing",)),
    "never": frozenset(),
}


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json` and what stands beside it.

    Args:
        data: what `tokenizer.json` holds.
        files: the tokenizer's own files by name, `tokenizer.json` and perhaps `tokenizer.model`.
        where: the file, for messages.

    Raises:
        UserError: it is no BPE over bytes, or the files beside it contradict it.
    """

    def __init__(
        self, data: dict[str, Any], surroundings: Surroundings, files: Mapping[str, bytes], where: str
    ) -> None:
        self._where, self._surroundings, self._files = where, surroundings, files
        self._spells_spaces = _spells_spaces(data, where)
        steps, scheme = _without_prefix_space(data, surroundings, self._spells_spaces)
        self._scheme, self._prefixed = scheme, _PREFIXED[scheme]
        self._library = _library(files[JSON_FILE], steps, where)
        _refuse_strips(data, where)
        _add_tokens(self._library, surroundings, where)
        self._library.encode_special_tokens = True  # control tokens in a text are spelt out
        super().__init__(self._bytes_of_tokens())
        added = self._library.get_added_tokens_decoder()
        # transformers 5 names an unknown token where a tokenizer has none: one that has a role already.
        names = surroundings.names
        unknown = {names.get("unk")} - {names.get(role) for role in ("bos", "eos", "pad")}
        special = ((i, token.content) for i, token in sorted(added.items()) if token.special)
        self.control_ids = {name: i for i, name in special if name not in unknown}
        self._byte_ids = {data: i for i, data in reversed(list(enumerate(self._bytes))) if len(data) == 1}
        self._settle_special_ids()
        self.chat_template = surroundings.chat_template
        self.fingerprint = self._fingerprint(data["model"], steps, scheme)
        self._check(steps)

    def encode_utf8(self, data: bytes, follows: Follows = "nothing") -> list[int]:
        """As in `Tokenizer`."""
        if data and follows in self._prefixed:
            data = b" " + data
        text = data.decode()
        if not self._spells_spaces or _SPACE not in text:
            return self._library.encode(text, add_special_tokens=False).ids
        # The library would give U+2581 back as a space, so it goes in as its three bytes.
        spelt = [self._byte_ids[bytes((byte,))] for byte in _SPACE.encode()]
        ids: list[int] = []
        for index, part in enumerate(text.split(_SPACE)):
            ids += (spelt if index else []) + self._library.encode(part, add_special_tokens=False).ids
        return ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """As in `Tokenizer`, on all cores."""
        if self._spells_spaces and any(_SPACE in text for text in texts):
            return super().encode_batch(texts)
        for text in texts:
            utf8(text)
        prefix = " " if "nothing" in self._prefixed else ""
        prefixed = [prefix + text if text else text for text in texts] if prefix else texts
        return [
            encoded.ids for encoded in self._library.encode_batch_fast(prefixed, add_special_tokens=False)
        ]

    def normalize(self, text: str) -> str:
        """As in `Tokenizer`."""
        return text if self.loss is None else self.decode(self.encode(text))

    def with_tokens(self, names: Sequence[str]) -> "HuggingFaceTokenizer":
        """A copy that knows further control tokens, under the ids behind its own."""
        library = Library.from_buffer(self._files[JSON_FILE])
        _add_tokens(library, self._surroundings, self._where)
        library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in names])
        data = library.to_str(pretty=True).encode()
        return HuggingFaceTokenizer(
            json.loads(data), self._surroundings, {JSON_FILE: data}, self._where
        ).with_chat_template(self.chat_template)

    def describe(self) -> Description:
        """As in `Tokenizer`: what the library holds."""
        return Description(json.loads(self._library.to_str()), self._scheme, self._spells_spaces)

    def save(self, folder: str | Path) -> None:
        """As in `Tokenizer`: all files as they came."""
        files = self._surroundings.files_with(self.chat_template)
        write_tokenizer(Path(folder), {**files, **self._files}, self.chat_template)

    def _without_prefix(self, data: bytes) -> bytes:
        return data.removeprefix(b" ") if self._prefixed else data

    def _bytes_of_tokens(self) -> list[bytes]:
        library, added = self._library, self._library.get_added_tokens_decoder()
        names = {i: name for name, i in library.get_vocab(with_added_tokens=True).items()}
        bytes_of = _fallback_bytes if self._spells_spaces else _byte_level_bytes
        tokens = [b""] * (max(names) + 1)
        for i, name in names.items():
            if i not in added:
                tokens[i] = bytes_of(name)
            elif not added[i].special:
                tokens[i] = name.encode()
        return tokens

    def _settle_special_ids(self) -> None:
        ids = {role: self._library.token_to_id(name) for role, name in self._surroundings.names.items()}
        self.bos_id, self.pad_id, self.unk_id = ids.get("bos"), ids.get("pad"), ids.get("unk")
        if (eos_id := ids.get("eos")) is None:
            if not self._surroundings.ends:
                remedy = "name one as eos_token in tokenizer_config.json"
                raise UserError(f"{self._where}:", "must have an eos token", got="none", remedy=remedy)
            eos_id = self._surroundings.ends[0]
        self.eos_id, self.eos_ids = eos_id, self._surroundings.eos_ids(eos_id)
        self.begin_ids = self._begin_ids()

    def _begin_ids(self) -> tuple[int, ...]:
        """What the file puts before a text. transformers does not look at `add_bos_token` beside it."""
        bare = self._library.encode("a", add_special_tokens=False).ids
        ids = self._library.encode("a").ids
        starts = (i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
        return tuple(ids[: next(starts, 0)])

    def _fingerprint(self, model: dict[str, Any], steps: dict[str, Any], scheme: str) -> str:
        """Lumi's own for a file that Lumi wrote, else the SHA-256 of what decides the ids."""
        added = self._library.get_added_tokens_decoder()
        tokens = [(i, token.content if token.special else repr(token)) for i, token in sorted(added.items())]
        fingerprint = json_fingerprint(model, steps, tokens, scheme, self.begin_ids)
        config = self._surroundings.config
        is_own = config.get(TWIN_FINGERPRINT_KEY) == fingerprint and isinstance(
            config.get(FINGERPRINT_KEY), str
        )
        return config[FINGERPRINT_KEY] if is_own else fingerprint

    def _check(self, steps: dict[str, Any]) -> None:
        missing = [byte for byte in _UTF8_BYTES if bytes((byte,)) not in self._byte_ids]
        if len(missing) > len(_UTF8_BYTES) // 4:
            expectation = "must have a token for each byte, to spell every text"
            got = f"{len(_UTF8_BYTES) - len(missing)} of {len(_UTF8_BYTES)}"
            raise UserError(f"{self._where}:", expectation, got=got, remedy=_REFUSED)
        controls = set(self.control_ids.values())
        for name in self.control_ids:
            if controls.intersection(self.encode(name)):
                expectation = f"must spell {name!r} out where a user writes it"
                raise UserError(f"{self._where}:", expectation, got="a control token")
        if self.decode(self.encode(PROBE)) != PROBE:
            kinds = [step["type"] for step in _steps(steps["normalizer"])]
            self.loss = f"its normalizer ({', '.join(kinds) or 'none'}) changes characters"
        elif missing:
            listed = " ".join(f"{byte:02X}" for byte in missing)
            self.loss = f"it has no token for the bytes {listed}, so characters with these vanish"


def _library(file: bytes, steps: dict[str, Any], where: str) -> Library:
    """The library's tokenizer of a `tokenizer.json` with other `steps` before its model."""
    bare = {"model": {"type": "BPE", "vocab": {}, "merges": []}, "version": "1.0", "added_tokens": []}
    try:
        whole, parsed = Library.from_buffer(file), Library.from_str(json.dumps(bare | steps))
    except Exception as error:  # the library raises nothing more special
        got = str(error).splitlines()[0][:200]
        expectation = "must be a file that the `tokenizers` library reads"
        raise UserError(f"{where}:", expectation, got=got, remedy="copy it again") from error
    whole.model.dropout = None  # of training; it would draw
    whole.normalizer, whole.pre_tokenizer = parsed.normalizer, parsed.pre_tokenizer
    whole.no_truncation()
    whole.no_padding()
    return whole


def _refuse_strips(data: dict[str, Any], where: str) -> None:
    """Raises UserError for control tokens that change the text around them, which Lumi encodes by itself."""
    for token in data.get("added_tokens", []):
        if token["special"] and any(token.get(key) for key in ("lstrip", "rstrip", "single_word")):
            subject = f"{where}: {token['content']!r}"
            expectation = "must stand for itself alone, without lstrip, rstrip and single_word"
            raise UserError(subject, expectation, got="one of them", remedy=_REFUSED)


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer, pre-tokenizer or decoder, which is one, a sequence of them, or nothing."""
    if part is None:
        return []
    lists = (part.get(key) for key in ("normalizers", "pretokenizers", "decoders"))
    return next((steps for steps in lists if steps is not None), [part])


def _spells_spaces(data: dict[str, Any], where: str) -> bool:
    """Whether the vocabulary writes ▁ for a space and bytes as <0x0A>. If not, it is of bytes in GPT-2's
    alphabet."""
    model = data.get("model", {})
    kinds = {step.get("type") for key in ("pre_tokenizer", "decoder") for step in _steps(data.get(key))}
    if model.get("type") != "BPE" or not (model.get("byte_fallback") or "ByteLevel" in kinds):
        got = f"{model.get('type')} without either"
        expectation = "must be BPE, of bytes (ByteLevel) or with byte_fallback"
        raise UserError(f"{where}:", expectation, got=got, remedy=_REFUSED)
    return "ByteLevel" not in kinds


def _without_prefix_space(
    data: dict[str, Any], surroundings: Surroundings, spells_spaces: bool
) -> tuple[dict[str, Any], str]:
    """The normalizer and pre-tokenizer without what puts a space before a text, and the scheme by which they
    do.

    Of a LlamaTokenizer, transformers takes vocabulary and merges alone; flags beside it say the rest.
    """
    steps = {key: copy.deepcopy(data.get(key)) for key in ("normalizer", "pre_tokenizer")}
    scheme = surroundings.llama_scheme()
    if scheme is not None and spells_spaces:
        return {"normalizer": None, "pre_tokenizer": spaces("never")}, scheme
    for scheme in ("first", "always"):
        if steps["pre_tokenizer"] == spaces(scheme):
            return steps | {"pre_tokenizer": spaces("never")}, scheme
    scheme = "never"
    kept = [step for step in _steps(steps["normalizer"]) if step != {"type": "Prepend", "prepend": _SPACE}]
    if len(kept) < len(_steps(steps["normalizer"])):
        scheme = "always"
        steps["normalizer"] = {"type": "Sequence", "normalizers": kept}
    for step in _steps(steps["pre_tokenizer"]):
        if step.get("type") == "Metaspace":
            scheme = step.get("prepend_scheme", "always" if step.pop("add_prefix_space", True) else "never")
            step["prepend_scheme"] = "never"
        elif step.get("type") == "ByteLevel" and step.get("add_prefix_space"):
            scheme, step["add_prefix_space"] = "always", False
    return steps, scheme


def _add_tokens(library: Library, surroundings: Surroundings, where: str) -> None:
    """Add what the files beside a tokenizer add, in transformers' order. All tokens with a role are control
    tokens."""
    for name, token_id in sorted(surroundings.added.items(), key=lambda item: item[1]):
        if library.token_to_id(name) is None:
            library.add_special_tokens([AddedToken(name, special=True, normalized=False)])
        if (got := library.token_to_id(name)) != token_id:
            expectation = f"must have the id {got} by the vocabulary, and no gap before it"
            remedy = (
                "remove it from tokenizer_config.json and added_tokens.json if the model does not need it"
            )
            raise UserError(f"{where}: the added token {name!r}", expectation, got=token_id, remedy=remedy)
    for role, name in surroundings.names.items():
        if library.token_to_id(name) is None:
            expectation = "must be a token of the vocabulary"
            subject = f"{where}: {role}_token in tokenizer_config.json"
            raise UserError(subject, expectation, got=repr(name), remedy="correct it there")
    special = [*surroundings.names.values(), *surroundings.extra]
    library.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in special])


def _fallback_bytes(name: str) -> bytes:
    if re.fullmatch("<0x[0-9A-Fa-f]{2}>", name):
        return bytes((int(name[3:5], 16),))
    return name.replace(_SPACE, " ").encode()


def _byte_alphabet() -> dict[int, int]:
    """From GPT-2's character for a byte to the byte: itself where it is printable, else the next one from
    U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {256 + index: byte for index, byte in enumerate(others)}


_ALPHABET = _byte_alphabet()


def _byte_level_bytes(name: str) -> bytes:
    try:
        return name.translate(_ALPHABET).encode("latin-1")
    except UnicodeEncodeError:
        return name.encode()
