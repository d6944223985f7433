"""Chat templates of other people's models: Jinja programs that can neither do harm nor read a user's text.

The template never sees what was said. Each message goes in as a random word, between the white space that the
message begins and ends with, because many templates trim it. The text that comes out is split at the control
pieces, which are therefore all the template's own. The caller then puts the contents in as plain text. So the
result depends on the roles and the white space alone, and is cached for the next conversation.

The template runs in Jinja's immutable sandbox, which exposes neither Python's internals nor anything to write
to. The sandbox cannot bound time and memory (a page of doublings fills any machine), so it has a process of
its own, which the system stops after `CPU_SECONDS` or at `MEMORY_BYTES`. On Windows only the limit of
`WALL_SECONDS` is left, and on macOS there is no bound on memory.
"""

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from enum import Enum
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from lumi.chat.messages import Message
from lumi.config import UserError

CPU_SECONDS = 2
MEMORY_BYTES = 1 << 30
WALL_SECONDS = 60  # generous, for machines that are busy
MAX_CHARACTERS = 1 << 20

SUBJECT = "the model's chat template"
_REPLACE = "replace chat_template.jinja in the tokenizer's folder"


class TemplateRefusal(UserError):  # noqa: N818 - data that is counted, not a failure of the program
    """A template does not take this conversation; it may take others."""


class ControlPiece(NamedTuple):
    """A control piece of the template."""

    piece: str


class Content(NamedTuple):
    """Where the content of message `place` (from 0), or its reasoning, goes, without the white space around
    it."""

    place: int
    is_reasoning: bool = False


class Mark(Enum):
    """Where {% generation %} begins, or ends."""

    BEGIN = "begin"
    END = "end"


Part = str | ControlPiece | Content | Mark


def parts(
    template: str,
    messages: Sequence[Message],
    *,
    pieces: Sequence[str],
    variables: Sequence[tuple[str, str]],
    add_generation_prompt: bool,
) -> tuple[Part, ...]:
    """Apply a template to a conversation: text, control pieces, the places of the contents and the marks of
    answers, in order.

    Args:
        template: Jinja, in the dialect of transformers' `apply_chat_template`.
        pieces: the tokenizer's control pieces. One with white space in it counts as text, since it may be a
            message's.
        variables: names and values for the template, such as ("bos_token", "<s>").
        add_generation_prompt: end with the header of the assistant's answer.

    Raises:
        UserError: the template is not valid, refuses the conversation, breaks out of the sandbox, takes too
            long, or drops, repeats or changes a message.
    """
    turns = tuple(
        (message.role, bool(message.reasoning), *_white_space(message.content)) for message in messages
    )
    return _parts(template, turns, tuple(pieces), tuple(variables), add_generation_prompt)


def _word() -> str:
    """A random word that no template changes unseen: long, in both cases, with what HTML and JSON escape."""
    return f"{secrets.token_hex(16)}Aa<&\"'>{'.' * 500}{secrets.token_hex(16)}"


def _white_space(content: str) -> tuple[str, str]:
    """The white space at both ends of a content."""
    start = len(content) - len(content.lstrip())
    return content[:start], content[max(start, len(content.rstrip())) :]


@lru_cache(maxsize=1024)
def _parts(
    template: str,
    turns: tuple[tuple[str, bool, str, str], ...],
    pieces: tuple[str, ...],
    variables: tuple[tuple[str, str], ...],
    add_generation_prompt: bool,
) -> tuple[Part, ...]:
    words, thoughts = ([_word() for _ in turns] for _ in range(2))
    messages = [
        {"role": role, "content": before + word + after} | ({"reasoning_content": thought} if thinks else {})
        for word, thought, (role, thinks, before, after) in zip(words, thoughts, turns, strict=True)
    ]
    ours = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    marks = [secrets.token_hex(16) for _ in Mark]
    text = _render(template, {**dict(variables), **ours}, marks)
    meaning: dict[str, Part] = {word: Content(index) for index, word in enumerate(words)}
    meaning |= {thought: Content(index, True) for index, thought in enumerate(thoughts)}
    meaning |= dict(zip(marks, Mark, strict=True))
    meaning |= {piece: ControlPiece(piece) for piece in pieces if piece and not re.search(r"\s", piece)}
    longest_first = sorted(meaning, key=len, reverse=True)
    pattern = "|".join(map(re.escape, longest_first))
    split = re.split(f"({pattern})", text) if pattern else [text]
    found = tuple(meaning.get(part, part) for part in split if part)
    for index, (role, *_) in enumerate(turns):
        count = found.count(Content(index))
        if count != 1 or found.count(Content(index, True)) > 1:
            raise TemplateRefusal(
                SUBJECT,
                "must show every message once and unchanged",
                got=f"message {index + 1} ({role}) {count} times",
                remedy=f"leave that message out, or {_REPLACE}",
            )
    return found


def _render(template: str, variables: dict[str, Any], marks: Sequence[str]) -> str:
    """Run a template in a process of its own. Raises UserError: it fails, or hits a limit.

    Args:
        marks: what to write where {% generation %} begins and where it ends.
    """
    command = [sys.executable, "-P", "-m", "lumi.chat.foreign_template"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    job = json.dumps({"template": template, "variables": variables, "marks": marks})
    try:
        process = subprocess.run(
            command, input=job, capture_output=True, text=True, env=environment, timeout=WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            SUBJECT,
            f"must finish within {WALL_SECONDS} s, but did not",
            remedy=f"{_REPLACE}, or try again when the machine is less busy",
        ) from None
    if process.returncode < 0:
        limits = f"{CPU_SECONDS} s and {MEMORY_BYTES >> 20} MiB"
        outcome = "but did not: it is broken or malicious"
        raise UserError(SUBJECT, f"must finish within {limits}, {outcome}", remedy=_REPLACE)
    if process.returncode > 0:
        raise RuntimeError(f"the process for chat templates failed: {process.stderr}")
    answer = json.loads(process.stdout)
    if "error" in answer:
        line = " ".join(answer["error"].split())
        kind = TemplateRefusal if answer["refuses"] else UserError
        raise kind(SUBJECT, f"must accept the conversation, but {line[:300]}")
    return answer["text"]


def main() -> None:
    """The process. It reads {"template", "variables", "marks"} as JSON. It prints {"text"}, or {"error"} and
    whether the template "refuses" the conversation."""
    from jinja2 import TemplateSyntaxError

    job = json.load(sys.stdin)
    _limit_resources()
    try:
        text = _environment(job["marks"]).from_string(job["template"]).render(**job["variables"])
        answer: dict[str, Any] = {"text": text}
        if len(text) > MAX_CHARACTERS:
            answer = {"error": f"makes {len(text)} characters of it"}
    except _Refusal as error:
        answer = {"error": f"says: {error}", "refuses": True}
    except TemplateSyntaxError as error:
        answer = {"error": f"is not valid Jinja, line {error.lineno}: {error.message}"}
    except MemoryError:
        answer = {"error": f"needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # whatever a stranger's program raises is its own fault
        answer = {"error": f"fails with {type(error).__name__}: {error}"}
    json.dump({"refuses": False} | answer, sys.stdout)


class _Refusal(Exception):  # noqa: N818 - what a template says with raise_exception
    pass


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    if sys.platform != "darwin":  # macOS does not enforce it
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _environment(marks: Sequence[str]) -> Any:
    """The sandbox with the extras that transformers gives to chat templates.

    They are in `_cached_compile_jinja_template` of its chat_template_utils.py.
    """
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers: `marks` stand around its content."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's way

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            content = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            begin, end = (nodes.Output([nodes.TemplateData(mark)]) for mark in marks)
            return [begin, *content, end]

    def refuse(message: str) -> NoReturn:
        raise _Refusal(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    to_json = lambda value, indent=None: json.dumps(value, ensure_ascii=False, indent=indent)
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


if __name__ == "__main__":
    main()
