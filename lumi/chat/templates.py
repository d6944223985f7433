"""Layouts of a conversation as data: what stands before and after the messages of each role.

The same layout as Jinja text is for other programs (transformers, vLLM, llama.cpp), which read it from
`chat_template.jinja` beside a model. Lumi renders from the data (`lumi/chat/rendering.py`): a finished text
no longer shows which part was a marker and which a user's words.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple


class Control(Enum):
    """A token that no text is ever encoded to; the value is the Jinja expression for it."""

    BOS = "bos_token"
    EOS = "eos_token"
    IM_START = "'<|im_start|>'"
    IM_END = "'<|im_end|>'"


Parts = tuple[str | Control, ...]


class TurnLayout(NamedTuple):
    """What stands around a message. The assistant's `after` begins with the token that ends its turn."""

    before: Parts
    after: Parts


@dataclass(frozen=True, kw_only=True)
class Template:
    """A layout of conversations. Every conversation begins with BOS.

    Attributes:
        name: on the command line and in manifests.
        turns: for each role what stands around its messages. The assistant's `before` also asks for an
            answer.
        default_system: the system message of a conversation that brings none; None: it stays without one.
    """

    name: str
    turns: Mapping[str, TurnLayout]
    default_system: str | None = None

    def __post_init__(self) -> None:
        after = self.turns["assistant"].after
        if not isinstance(after[0], Control):
            raise ValueError(f"turns['assistant'].after must begin with a control token, got {after!r}")

    @property
    def end_of_turn(self) -> Control:
        """The token that ends an answer."""
        end = self.turns["assistant"].after[0]
        assert isinstance(end, Control)
        return end

    @property
    def controls(self) -> frozenset[Control]:
        """The control tokens that a tokenizer must have for this layout."""
        parts = [part for turn in self.turns.values() for part in turn.before + turn.after]
        return frozenset([Control.BOS, *(part for part in parts if isinstance(part, Control))])

    @cached_property
    def jinja(self) -> str:
        """The layout as a Jinja template, in the variables that transformers gives to chat templates."""
        lines = ["{{- bos_token }}"]
        if self.default_system is not None:
            system = self.turns["system"]
            default = _expression((*system.before, self.default_system, *system.after))
            lines.append("{%- if not messages or messages[0]['role'] != 'system' %}")
            lines.append(f"    {{{{- {default} }}}}")
            lines.append("{%- endif %}")
        lines.append("{%- for message in messages %}")
        for number, (role, turn) in enumerate(self.turns.items()):
            around = [_expression(turn.before), "message['content']", _expression(turn.after)]
            lines.append(f"    {{%- {'elif' if number else 'if'} message['role'] == '{role}' %}}")
            lines.append(f"        {{{{- {' + '.join(filter(None, around))} }}}}")
        refusal = f"'role must be one of {', '.join(self.turns)}, got ' + message['role']"
        lines.append("    {%- else %}")
        lines.append(f"        {{{{- raise_exception({refusal}) }}}}")
        lines += ["    {%- endif %}", "{%- endfor %}", "{%- if add_generation_prompt %}"]
        lines.append(f"    {{{{- {_expression(self.turns['assistant'].before)} }}}}")
        return "\n".join([*lines, "{%- endif %}\n"])


def _expression(parts: Parts) -> str:
    terms = (part.value if isinstance(part, Control) else _quote(part) for part in parts)
    # Neighbouring literals become one. A quote inside a literal has a backslash before it, and is not
    # touched.
    return " + ".join(terms).replace("' + '", "")


def _quote(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


# OpenAI's "chat markup language" as Qwen, SmolLM and many others use it, after a BOS.
CHATML = Template(
    name="chatml",
    turns={
        role: TurnLayout((Control.IM_START, f"{role}\n"), (Control.IM_END, "\n"))
        for role in ("system", "user", "assistant")
    },
)

# Taori et al. 2023, https://github.com/tatsu-lab/stanford_alpaca; further turns follow after EOS.
ALPACA = Template(
    name="alpaca",
    turns={
        "system": TurnLayout((), ("\n\n",)),
        "user": TurnLayout(("### Instruction:\n",), ("\n\n",)),
        "assistant": TurnLayout(("### Response:\n",), (Control.EOS, "\n\n")),
    },
    default_system="Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.",
)

PLAIN = Template(
    name="plain",
    turns={
        "system": TurnLayout((), ("\n\n",)),
        "user": TurnLayout(("User:\n",), ("\n\n",)),
        "assistant": TurnLayout(("Assistant:\n",), (Control.EOS, "\n\n")),
    },
)

TEMPLATES = {template.name: template for template in (CHATML, ALPACA, PLAIN)}
