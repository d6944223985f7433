"""How byte-level tokenizers cut a text into words before they merge, by llama.cpp's names for it.

A GGUF file holds only the name. llama.cpp has the rules built in, so one that it lacks cannot be written, and
none is guessed.
"""

from typing import Any, NamedTuple

from lumi.config import UserError

_LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_2 = _LLAMA_3.replace(r"\p{N}{1,3}", r"\p{N}")
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*|\p{{N}}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_ALIASES = {  # names of the same rules
    "llama3": "llama-bpe",
    "llama-v3": "llama-bpe",
    "dbrx": "smaug-bpe",
    "deepseek-r1-qwen": "qwen2",
    "megrez": "qwen2",
    "phi-2": "gpt-2",
}


class Words(NamedTuple):
    """A rule.

    Attributes:
        steps: the pre-tokenizers of a `tokenizer.json`.
        ignores_merges: a word that is a token is taken as it is.
    """

    steps: list[dict[str, Any]]
    ignores_merges: bool = False


def _bytes(use_regex: bool) -> dict[str, Any]:
    return {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}


def _split(pattern: str) -> list[dict[str, Any]]:
    step = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    return [step, _bytes(False)]


WORDS = {
    "gpt-2": Words([_bytes(True)]),
    "smollm": Words([{"type": "Digits", "individual_digits": True}, _bytes(True)]),
    "llama-bpe": Words(_split(_LLAMA_3), ignores_merges=True),
    "smaug-bpe": Words(_split(_LLAMA_3)),
    "qwen2": Words(_split(_QWEN_2)),
    "tekken": Words(_split(_TEKKEN), ignores_merges=True),
}


def name_of(steps: list[dict[str, Any]], ignores_merges: bool, all_merge: bool) -> str:
    """llama.cpp's name of a rule.

    Args:
        steps: the pre-tokenizers of a `tokenizer.json`.
        ignores_merges: as in the file.
        all_merge: the merges make every token out of its own bytes, so that `ignores_merges` does not matter.

    Raises:
        UserError: llama.cpp has no such rule.
    """
    plain = [_plain(step) for step in steps]
    same = [name for name, words in WORDS.items() if [_plain(step) for step in words.steps] == plain]
    exact = [name for name in same if WORDS[name].ignores_merges == ignores_merges]
    if found := exact or (same if all_merge else []):
        return found[0]
    shown = ", ".join(_describe(step) for step in steps) or "none"
    if same:
        shown += f" with ignore_merges = {str(ignores_merges).lower()}"
    expectation = f"must cut texts into words as one of llama.cpp's does ({', '.join(WORDS)})"
    raise UserError("the tokenizer", expectation, got=shown, remedy="it cannot be written as GGUF")


def words_of(name: str, where: str) -> Words:
    """The rule of a name in a file. Raises UserError for one that is not known here."""
    if (known := _ALIASES.get(name, name)) in WORDS:
        return WORDS[known]
    expectation = f"must be {', '.join(WORDS)} or another name of one of them"
    raise UserError(f"{where}: tokenizer.ggml.pre", expectation, got=repr(name)[:60])


def _plain(step: dict[str, Any]) -> dict[str, Any]:
    """A step without what does not change ids."""
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _describe(step: dict[str, Any]) -> str:
    pattern = step.get("pattern")
    return f"{step.get('type')}({next(iter(pattern.values()))!r})" if pattern else str(step.get("type"))
