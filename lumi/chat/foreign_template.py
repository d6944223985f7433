"""Chat templates of other people's models: Jinja programs of unknown origin, kept from doing harm and from parsing a user's text.

The template never sees what was said. Each message goes in as a random word (between the spaces that the message begins and ends with,
since many templates trim), the text that comes out is split at the control pieces, all of which are therefore the template's own, and
the caller puts the contents in as plain text. So the result depends on the roles alone and is remembered for the next conversation.

It runs in Jinja's immutable sandbox, which gives out neither Python's internals nor anything to write to. The sandbox cannot bound time
and memory (a page of doublings fills any machine), so it stands in a process of its own, which the system stops after `CPU_SECONDS`
or at `MEMORY_BYTES`. Where Python has no `resource` module (Windows) only the patience of `WALL_SECONDS` is left; macOS does not
enforce the bound on memory.
"""

import json
import os
import re
import secrets
import subprocess
import sys
from collections.abc import Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any, NamedTuple, NoReturn

from lumi.chat.messages import Message
from lumi.config import UserError

CPU_SECONDS = 2
MEMORY_BYTES = 1 << 30
WALL_SECONDS = 60  # for machines that are busy with other things
MAX_CHARACTERS = 1 << 20


class ControlPiece(NamedTuple):
    """A control piece of the template."""

    piece: str


class Content(NamedTuple):
    """The place of the content of message `place` (from 0), stripped of the white space around it."""

    place: int


Part = str | ControlPiece | Content


def parts(
    template: str,
    messages: Sequence[Message],
    *,
    pieces: Sequence[str],
    variables: Sequence[tuple[str, str]],
    add_generation_prompt: bool,
) -> tuple[Part, ...]:
    """What a template makes of a conversation: text, control pieces and the places of the contents, in order.

    Args:
        template: Jinja, in the dialect of transformers' `apply_chat_template`.
        pieces: the tokenizer's control pieces. One with white space in it is taken for text, since a message could have brought that.
        variables: names and values that the template may use, such as ("bos_token", "<s>").
        add_generation_prompt: whether the header of the assistant's answer is to follow.

    Raises:
        UserError: the template is not valid, refuses the conversation, breaks out, takes too long, or drops, repeats or changes a message.
    """
    turns = tuple((message.role, *_white_space(message.content)) for message in messages)
    return _parts(template, turns, tuple(pieces), tuple(variables), add_generation_prompt)


def _white_space(content: str) -> tuple[str, str]:
    """What stands before and after the rest of a content."""
    start = len(content) - len(content.lstrip())
    return content[:start], content[max(start, len(content.rstrip())) :]


@lru_cache(maxsize=1024)
def _parts(
    template: str,
    turns: tuple[tuple[str, str, str], ...],
    pieces: tuple[str, ...],
    variables: tuple[tuple[str, str], ...],
    add_generation_prompt: bool,
) -> tuple[Part, ...]:
    words = [secrets.token_hex(16) for _ in turns]
    messages = [
        {"role": role, "content": before + word + after}
        for word, (role, before, after) in zip(words, turns, strict=True)
    ]
    ours = {
        "messages": messages,
        "add_generation_prompt": add_generation_prompt,
        "tools": None,
        "documents": None,
    }
    text = _render(template, {**dict(variables), **ours})
    meaning: dict[str, Part] = {
        piece: ControlPiece(piece) for piece in pieces if piece and not re.search(r"\s", piece)
    }
    meaning |= {word: Content(index) for index, word in enumerate(words)}
    pattern = "|".join(re.escape(key) for key in sorted(meaning, key=len, reverse=True))
    found = tuple(
        meaning.get(part, part) for part in (re.split(f"({pattern})", text) if pattern else [text]) if part
    )
    for index, (role, *_) in enumerate(turns):
        if (count := found.count(Content(index))) != 1:
            raise UserError(
                f"the model's chat template must show every message once and unchanged, got message {index + 1} ({role}) {count} times; "
                "leave that message out, or replace chat_template.jinja in the tokenizer's folder"
            )
    return found


def _render(template: str, variables: dict[str, Any]) -> str:
    """Run a template in a process of its own. Raises UserError with its error."""
    command = [sys.executable, "-P", "-m", "lumi.chat.foreign_template"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))}
    job = json.dumps({"template": template, "variables": variables})
    try:
        process = subprocess.run(
            command, input=job, capture_output=True, text=True, env=environment, timeout=WALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"the model's chat template must finish within {WALL_SECONDS} s, but did not; replace chat_template.jinja in the tokenizer's "
            "folder, or try again when the machine is less busy"
        ) from None
    if process.returncode < 0:
        raise UserError(
            f"the model's chat template must finish within {CPU_SECONDS} s and {MEMORY_BYTES >> 20} MiB, but did not: it is broken or "
            "malicious; replace chat_template.jinja in the tokenizer's folder"
        )
    if process.returncode > 0:
        raise RuntimeError(f"the process for chat templates failed: {process.stderr}")
    answer = json.loads(process.stdout)
    if "error" in answer:
        line = " ".join(answer["error"].split())
        raise UserError(f"the model's chat template must accept the conversation, but {line[:300]}")
    return answer["text"]


def main() -> None:
    """The process: {"template", "variables"} as JSON on standard input, {"text"} or {"error"} on standard output."""
    from jinja2 import TemplateSyntaxError

    job = json.load(sys.stdin)
    _limit_resources()
    try:
        text = _environment().from_string(job["template"]).render(**job["variables"])
        answer = (
            {"text": text}
            if len(text) <= MAX_CHARACTERS
            else {"error": f"makes {len(text)} characters of it"}
        )
    except _Refusal as error:
        answer = {"error": f"says: {error}"}
    except TemplateSyntaxError as error:
        answer = {"error": f"is not valid Jinja, line {error.lineno}: {error.message}"}
    except MemoryError:
        answer = {"error": f"needs more than {MEMORY_BYTES >> 20} MiB"}
    except Exception as error:  # whatever it raises is a fault of the template, a stranger's program
        answer = {"error": f"fails with {type(error).__name__}: {error}"}
    json.dump(answer, sys.stdout)


class _Refusal(Exception):  # noqa: N818 - what a template says with raise_exception
    pass


def _limit_resources() -> None:
    try:
        import resource
    except ImportError:  # Windows
        return
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _environment() -> Any:
    """The sandbox, with what transformers offers to chat templates (`_cached_compile_jinja_template` in chat_template_utils.py)."""
    from jinja2 import nodes
    from jinja2.ext import Extension, loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """{% generation %} marks answers for transformers' own loss masks; here it is what stands in it."""

        tags = {"generation"}  # noqa: RUF012 - Jinja's way

        def parse(self, parser: Any) -> list[nodes.Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def refuse(message: str) -> NoReturn:
        raise _Refusal(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    environment.filters["tojson"] = lambda value, indent=None: json.dumps(
        value, ensure_ascii=False, indent=indent
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    return environment


if __name__ == "__main__":
    main()
