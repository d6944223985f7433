"""A tokenizer as GGUF metadata, in one of llama.cpp's two kinds that read it as we do.

`llama` is SentencePiece BPE: neighbours are joined by the score of what they make. `gpt2` is BPE of bytes:
neighbours are joined by the rank of a merge, inside of words.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lumi.config import UserError
from lumi.formats.gguf_words import name_of
from lumi.formats.hf_config import end_ids
from lumi.tokenizer.files import all_merges
from lumi.tokenizer.tokenizer import Description, Tokenizer

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # llama.cpp's types of tokens
END_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
KEY = "tokenizer.ggml."
CHAT_TEMPLATE = "tokenizer.chat_template"
_REFUSED = "it cannot be written as GGUF"
_WRITES_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
_NO_CHANGE = {"continuing_subword_prefix": ("", None), "end_of_word_suffix": ("", None)}


class Vocabulary(NamedTuple):
    """What a file says of a tokenizer.

    Attributes:
        notes: what llama.cpp does in another way, a line each.
    """

    metadata: dict[str, Any]
    notes: list[str]


def to_vocabulary(tokenizer: Tokenizer, vocab_size: int) -> Vocabulary:
    """The metadata of a tokenizer.

    Args:
        vocab_size: of the model. Ids that the tokenizer does not have become unused tokens.

    Raises:
        UserError: llama.cpp does not encode as this tokenizer does.
    """
    description = tokenizer.describe()
    names = _names(description.data, vocab_size)
    types = _types(description, tokenizer, names)
    make = _sentencepiece if description.spells_spaces else _byte_level
    own, notes = make(description, names, types)
    metadata = own | {"token_type": types, "add_bos_token": _adds_bos(tokenizer), "add_eos_token": False}
    ends = end_ids(tokenizer)
    roles = {"bos_token_id": tokenizer.bos_id, "unknown_token_id": tokenizer.unk_id}
    roles |= {"padding_token_id": tokenizer.pad_id, **dict(zip(END_KEYS, ends, strict=False))}
    metadata |= {key: token_id for key, token_id in roles.items() if token_id is not None}
    if further := [names[token_id] for token_id in ends[len(END_KEYS) :]]:
        notes.append(f"a GGUF file names {len(END_KEYS)} ids that end a text, so not {', '.join(further)}")
    template = tokenizer.chat_template or ""
    if template and metadata["add_bos_token"] and not _begins(template, names[tokenizer.bos_id or 0]):
        notes.append("llama.cpp puts the BOS before conversations too, where the chat template has none")
    result = {f"{KEY}{key}": value for key, value in metadata.items()}
    if template:
        result[CHAT_TEMPLATE] = template
    return Vocabulary(result, notes)


def _names(data: dict[str, Any], vocab_size: int) -> list[str]:
    """The names of all tokens by id. llama.cpp takes no name twice."""
    known = {token_id: name for name, token_id in data["model"]["vocab"].items()}
    known |= {token["id"]: token["content"] for token in data["added_tokens"]}
    taken, names = set(known.values()), []
    for token_id in range(vocab_size):
        name = known.get(token_id) or f"[PAD{token_id}]"
        while token_id not in known and name in taken:
            name = f"[{name}]"
        names.append(name)
    return names


def _types(description: Description, tokenizer: Tokenizer, names: Sequence[str]) -> list[int]:
    types = [UNUSED for _ in names]
    for token_id in description.data["model"]["vocab"].values():
        types[token_id] = NORMAL
    for token in description.data["added_tokens"]:
        types[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if description.spells_spaces:
        byte_names = {f"<0x{byte:02X}>" for byte in range(256)}
        for token_id, name in enumerate(names):
            if types[token_id] == NORMAL and name in byte_names:
                types[token_id] = BYTE
        if types.count(BYTE) < 256:
            expectation, got = "must have all 256 byte tokens for llama.cpp", types.count(BYTE)
            raise UserError("the tokenizer", expectation, got=got, remedy=_REFUSED)
        if tokenizer.unk_id is not None and tokenizer.unk_id not in tokenizer.control_ids.values():
            types[tokenizer.unk_id] = UNKNOWN
    return types


def _adds_bos(tokenizer: Tokenizer) -> bool:
    if tokenizer.begin_ids not in ((), (tokenizer.bos_id,)):
        expectation, got = "must put its BOS or nothing before a text", list(tokenizer.begin_ids)
        raise UserError("the tokenizer", expectation, got=f"the ids {got}", remedy=_REFUSED)
    return tokenizer.begin_ids != ()


def _begins(template: str, bos: str) -> bool:
    """Whether a chat template may write the BOS."""
    return "bos_token" in template or bos in template


def _sentencepiece(
    description: Description, names: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    data, notes = description.data, []
    for step in (*_steps(data["normalizer"]), *_steps(data["pre_tokenizer"])):
        if step != _WRITES_SPACES and (step["type"] != "Metaspace" or step.get("split", True)):
            _refuse_step(step["type"], "▁ for a space")
    merges = _merges(data)
    made: dict[str, int] = {}  # the pieces that merges make, in their order
    ranks = [made.setdefault(left + right, len(made)) for left, right in merges]
    learned = [token_id for token_id, kind in enumerate(types) if kind == NORMAL]
    is_settled = data["model"].get("ignore_merges") or set(all_merges(names, learned)) != set(merges)
    if ranks != sorted(ranks) or is_settled:
        expectation = "must join pieces as SentencePiece does, by the order of what they make"
        raise UserError("the tokenizer", expectation, got="another order", remedy=_REFUSED)
    if description.scheme == "first":
        notes.append("llama.cpp puts a space after control tokens too, as before a text")
    own = {
        "model": "llama",
        "pre": "default",
        "tokens": list(names),
        "scores": [-float(made.get(name, len(made))) for name in names],
        "add_space_prefix": description.scheme != "never",
    }
    return own, notes


def _byte_level(
    description: Description, names: Sequence[str], types: Sequence[int]
) -> tuple[dict[str, Any], list[str]]:
    from tokenizers.models import BPE  # Lumi's own tokenizers need no further library

    data, notes = description.data, []
    for step in _steps(data["normalizer"]):
        if step["type"] != "NFC":
            _refuse_step(step["type"], "NFC")
        notes.append("llama.cpp leaves the tokenizer's normalizer (NFC) out")
    if description.scheme != "never":
        expectation, got = "must put no space before a text", description.scheme
        raise UserError("the tokenizer", expectation, got=got, remedy=_REFUSED)
    if any(data["model"].get(key) not in allowed for key, allowed in _NO_CHANGE.items()):
        expectation = "must have no prefix or suffix for parts of words"
        raise UserError("the tokenizer", expectation, got="one", remedy=_REFUSED)
    merging = BPE(vocab=data["model"]["vocab"], merges=_merges(data))
    words = (name for name, kind in zip(names, types, strict=True) if kind == NORMAL)
    all_merge = all(len(merging.tokenize(name)) == 1 for name in words)
    pre = name_of(_steps(data["pre_tokenizer"]), bool(data["model"].get("ignore_merges")), all_merge)
    if pre == "tekken":
        notes.append(
            "llama.cpp cuts words with capitals outside of ASCII or with combining marks in its own way"
        )
    merges = [" ".join(pair) for pair in _merges(data)]
    return {"model": "gpt2", "pre": pre, "tokens": list(names), "merges": merges}, notes


def _merges(data: dict[str, Any]) -> list[tuple[str, str]]:
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in data["model"]["merges"])
    return [(left, right) for left, right in pairs]


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The steps of a normalizer or pre-tokenizer: one, several or none, also of sequences in sequences."""
    if part is None:
        return []
    lists = (part.get(key) for key in ("normalizers", "pretokenizers"))
    inner = next((steps for steps in lists if steps is not None), None)
    return [part] if inner is None else [step for steps in inner for step in _steps(steps)]


def _refuse_step(kind: str, allowed: str) -> None:
    expectation = f"must change nothing in a text but write {allowed}, for llama.cpp"
    raise UserError("the tokenizer", expectation, got=kind, remedy=_REFUSED)
