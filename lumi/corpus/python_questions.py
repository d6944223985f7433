"""Questions about Python's library, answered from its documentation: conversations without a download."""

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import Any, Literal

from lumi.chat.messages import Conversation, Message
from lumi.corpus.docstrings import Entry
from lumi.corpus.python_docs import open_entries

PHRASING_VERSION = 2  # part of the cache key: raise it when the same entries would give other conversations
LONGEST_SIGNATURE = 100  # characters; a longer one does not fit into a sentence
# Words of a text without a full stop: "device" and "self % other" answer nothing.
LEAST_WORDS = 3
KNOWN_AS = {"builtins.": "", "posix.": "os.", "posixpath.": "os.path."}  # how people write these names

CALL = "How do I call `{}`?"
FUNCTION = ("What does `{}` do?", "What is `{}` for?", "Explain `{}`.")
ATTRIBUTE = ("What is `{}`?", "Explain `{}`.")
CLASS = ("What is `{}`?", "What is the class `{}` for?")
MODULE = ("What is the module `{}` for?", "What does the module `{}` do?")

# The first line of many docstrings: `name(arguments)`, `name(arguments) -> type`, `name(arguments) -- text`.
SIGNATURE = re.compile(r"[\w.]+(?:\(.*?\)|(?= ->|: ))(?:\s*\[.*\])?(?:\s*(?:->|--|:)\s*(?P<rest>.*))?")
RESULT = re.compile(r"^\w+[.,]\s+")  # "-> x.  Generates an int with k random bits."
LAYOUT = re.compile(r"\s|[-*+#|:@>=~.]|\d+[.)]\s")  # how a line of code, a list, a table or a field begins
ABBREVIATIONS = r"(?<!e\.g\.)(?<!i\.e\.)(?<!a\.k\.a\.)(?<!etc\.)(?<!vs\.)"
SENTENCE_END = re.compile(rf"(?<=[.!?]){ABBREVIATIONS}\s+(?=[A-Z`'\"(])")
MARKUP = (
    (re.compile(r":[\w:]+:`~?([^`<]+)(?:\s<[^`]*)?`"), r"`\1`"),  # :func:`name`
    (re.compile(r"``([^`]+)``"), r"`\1`"),
    (re.compile(r"`(\w+)'"), r"`\1`"),
    (re.compile(r"(?<!\w)\*(\w+)\*(?!\w)"), r"`\1`"),
)


def read_questions(
    packages: tuple[str, ...],
    modules: Literal["all", "train", "held_out"],
    held_out_fraction: float,
    max_answer_chars: int,
) -> tuple[dict[str, Any], Iterator[Conversation | str]]:
    """What was found (sha256, entries, skipped modules), and for each entry of one side a conversation.

    An entry without a conversation gives a reason. "no_summary": its documentation gives no answer.
    "answer_in_train", on the side "held_out": the documentation of a module on the side "train" has the
    same words.

    Args:
        packages, modules, held_out_fraction, max_answer_chars: as in `PythonQuestionsSource`.

    Raises:
        UserError: a package cannot be imported.
    """
    header, entries = open_entries(packages)
    facts = {"sha256": header["sha256"], "entries": header["documents"]}
    facts["skipped_modules"] = header["skipped_modules"]
    return facts, _ask_side(entries, modules, held_out_fraction, max_answer_chars)


def ask(entry: Entry, max_answer_chars: int) -> Conversation | None:
    """A question about an entry and the answer, or None. A hash of the name picks one of a few phrasings."""
    summary = summarize(entry.docstring, max_answer_chars)
    if not summary:
        return None
    name = entry.qualified_name
    for prefix, known_as in KNOWN_AS.items():
        if name.startswith(prefix):
            name = known_as + name.removeprefix(prefix)
    phrasings = {"module": MODULE, "class": CLASS}.get(entry.kind, FUNCTION if entry.signature else ATTRIBUTE)
    call = _call(name, entry)
    with_call = summarize(entry.docstring, max_answer_chars - len(call)) if call else ""
    if with_call:
        phrasings = (*phrasings, CALL)
    question = phrasings[_hash(entry.qualified_name) % len(phrasings)]
    answer = f"{call}{with_call}" if question == CALL else summary
    return Message("user", question.format(name)), Message("assistant", answer)


def summarize(docstring: str, max_chars: int) -> str:
    """The first sentences of a docstring in one line of at most `max_chars` characters, or ""."""
    text = " ".join(" ".join(_first_paragraph(docstring)).split())
    for pattern, replacement in MARKUP:
        text = pattern.sub(replacement, text)
    sentences = SENTENCE_END.split(text)
    if sentences[-1].endswith((":", ",", ";")):  # it introduces a list or code
        sentences.pop()
    if not sentences or not sentences[0]:
        return ""
    least_words = LEAST_WORDS - 1
    if sentences[-1][-1] not in ".!?":
        sentences[-1] += "."
        least_words = LEAST_WORDS
    summary = ""
    for sentence in sentences:
        longer = f"{summary} {sentence}" if summary else sentence
        if len(longer) > max_chars:
            break
        summary = longer
    begins_well = summary[:1].isalpha() or summary.startswith("`")
    if not begins_well or len(re.findall(r"[A-Za-z]+", summary)) < least_words:
        return ""
    return summary[0].upper() + summary[1:]


def is_held_out(module: str, fraction: float) -> bool:
    """Whether a module is among the `fraction` that is held out from training. Its name alone decides."""
    return _hash(module) < fraction * 2**64


def _ask_side(
    entries: Iterable[Entry], modules: str, held_out_fraction: float, max_answer_chars: int
) -> Iterator[Conversation | str]:
    train_answers: set[str] = set()
    if (
        modules == "held_out"
    ):  # modules of both sides alternate, so all entries must be read before the first answer
        entries = list(entries)
        train = [entry for entry in entries if not is_held_out(_module(entry), held_out_fraction)]
        train_answers = {summarize(entry.docstring, max_answer_chars) for entry in train}
    for entry in entries:
        if modules != "all" and is_held_out(_module(entry), held_out_fraction) != (modules == "held_out"):
            continue
        conversation = ask(entry, max_answer_chars)
        if conversation is None:
            yield "no_summary"
        elif summarize(entry.docstring, max_answer_chars) in train_answers:
            yield "answer_in_train"
        else:
            yield conversation


def _module(entry: Entry) -> str:
    return entry.owner.rpartition(".")[0] if entry.kind == "method" else entry.owner


def _first_paragraph(docstring: str) -> list[str]:
    """The lines of the first paragraph of prose: after signatures, up to a list, code or an empty line."""
    lines = docstring.strip().split("\n")
    while lines and (match := SIGNATURE.fullmatch(lines[0].strip())):
        rest = RESULT.sub("", match["rest"] or "")
        is_prose = rest[:1].isalpha() and len(rest.split()) >= LEAST_WORDS
        # "-> floating point number": a type
        stands_alone = len(lines) > 1 and not lines[1].strip() and not rest.endswith(".")
        if is_prose and not stands_alone:
            lines[0] = rest
            break
        lines.pop(0)
        while lines and not lines[0].strip():
            lines.pop(0)
    for index, line in enumerate(lines):
        if index > 0 and (not line.strip() or LAYOUT.match(line)):
            return lines[:index]
    return lines


def _call(name: str, entry: Entry) -> str:
    """`` `name(arguments)`.  `` for a function or method, without `self`; "" if it says little or is long."""
    signature = re.sub(r"^\((?:self|cls)(?:, /)?(?:, )?", "(", entry.signature)
    says_little = entry.kind not in ("function", "method") or signature in ("", "(*args, **kwargs)")
    if says_little or "<" in signature or len(name + signature) > LONGEST_SIGNATURE:
        return ""
    return f"`{name}{signature}`. "


def _hash(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
