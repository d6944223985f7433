"""How a record of a source is read as a conversation: the config of each format that chat data comes in, and its reader.

A conversation travels from the source to the corpus folder as text: the JSON of its messages.
"""

import abc
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lumi.chat.messages import Conversation, MalformedConversation, Message, parse_messages, to_json

SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bard": "assistant",
}


class Format(abc.ABC):
    """How a record is read; `required` and `optional` are the fields that it looks at."""

    @property
    @abc.abstractmethod
    def required(self) -> tuple[str, ...]:
        """Fields without which there is no conversation."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields that may be missing."""
        return ()

    @abc.abstractmethod
    def read(self, record: dict[str, Any]) -> Conversation:
        """The conversation in a record. Raises MalformedConversation, with the reason that it is counted under."""


@dataclass(frozen=True, kw_only=True)
class AlpacaFormat(Format):
    """`instruction`, `input` (may be missing or blank) and `output`, perhaps `system`; the input goes below the instruction."""

    kind: Literal["alpaca"] = "alpaca"
    required = ("instruction", "output")
    optional = ("input", "system")

    def read(self, record: dict[str, Any]) -> Conversation:
        question = _join(read_string(record, "instruction"), read_string(record, "input", optional=True))
        return _exchange(
            read_string(record, "system", optional=True), question, read_string(record, "output")
        )


@dataclass(frozen=True, kw_only=True)
class DollyFormat(Format):
    """`instruction`, `context` (may be missing or blank) and `response`.

    The context goes below the instruction, where the authors of the dataset put it (databrickslabs/dolly).
    """

    kind: Literal["dolly"] = "dolly"
    required = ("instruction", "response")
    optional = ("context",)

    def read(self, record: dict[str, Any]) -> Conversation:
        question = _join(read_string(record, "instruction"), read_string(record, "context", optional=True))
        return _exchange("", question, read_string(record, "response"))


@dataclass(frozen=True, kw_only=True)
class MessagesFormat(Format):
    """A list of {"role", "content"} in `field`."""

    kind: Literal["messages"] = "messages"
    field: str = "messages"

    def __post_init__(self) -> None:
        check_names(field=self.field)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.field,)

    def read(self, record: dict[str, Any]) -> Conversation:
        return parse_messages(read_field(record, self.field))


@dataclass(frozen=True, kw_only=True)
class ShareGptFormat(Format):
    """A list of {"from", "value"} in `field`; in files of preferences `answer_field` ("chosen") holds one more such message."""

    kind: Literal["sharegpt"] = "sharegpt"
    field: str = "conversations"
    answer_field: str | None = None

    def __post_init__(self) -> None:
        check_names(field=self.field, answer_field=self.answer_field)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.field,) if self.answer_field is None else (self.field, self.answer_field)

    def read(self, record: dict[str, Any]) -> Conversation:
        turns = read_field(record, self.field)
        if isinstance(turns, list) and self.answer_field is not None:
            turns = [*turns, read_field(record, self.answer_field)]
        if isinstance(turns, list):
            turns = [_rename(turn) for turn in turns]
        return parse_messages(turns)


@dataclass(frozen=True, kw_only=True)
class PromptResponseFormat(Format):
    """A question and its answer in two fields, perhaps a system message in a third."""

    kind: Literal["prompt_response"] = "prompt_response"
    prompt_field: str = "prompt"
    response_field: str = "response"
    system_field: str | None = None

    def __post_init__(self) -> None:
        check_names(
            prompt_field=self.prompt_field, response_field=self.response_field, system_field=self.system_field
        )

    @property
    def required(self) -> tuple[str, ...]:
        fields = (self.prompt_field, self.response_field)
        return fields if self.system_field is None else (*fields, self.system_field)

    def read(self, record: dict[str, Any]) -> Conversation:
        system = "" if self.system_field is None else read_string(record, self.system_field, optional=True)
        return _exchange(
            system, read_string(record, self.prompt_field), read_string(record, self.response_field)
        )


def pack(messages: Sequence[Message]) -> str:
    """A conversation as one text, for the way through workers and cache: the JSON of its messages."""
    return json.dumps(to_json(messages), ensure_ascii=False)


def unpack(text: str) -> Conversation:
    """What `pack` packed."""
    return tuple(Message(**message) for message in json.loads(text))


def contents(messages: Sequence[Message]) -> str:
    """What was said, in order, a line end between the messages."""
    return "\n".join(message.content for message in messages)


def read_field(record: dict[str, Any], name: str) -> Any:
    """The value of a field. Raises MalformedConversation if there is none."""
    if record.get(name) is None:
        fields = ", ".join(map(repr, record)) or "no fields"
        raise MalformedConversation("missing_text", f"no field {name!r}; it has {fields}"[:300])
    return record[name]


def read_string(record: dict[str, Any], name: str, *, optional: bool = False) -> str:
    """The text of a field; "" if it is missing and may be. Raises MalformedConversation."""
    value = (record.get(name) or "") if optional else read_field(record, name)
    if not isinstance(value, str):
        raise MalformedConversation("wrong_type", f"{name!r} must be a string, got {type(value).__name__}")
    return value


def check_names(**fields: str | None) -> None:
    """Raises ValueError if the name of a field is empty, or stands twice."""
    for key, name in fields.items():
        if name == "":
            raise ValueError(f'{key} must be a name, got ""')
    names = [name for name in fields.values() if name is not None]
    if len(set(names)) < len(names):
        raise ValueError(f"{', '.join(fields)} must be different names, got {', '.join(names)}")


def _exchange(system: str, question: str, answer: str) -> Conversation:
    spoken = (Message("user", question), Message("assistant", answer))
    return (Message("system", system), *spoken) if system.strip() else spoken


def _join(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def _rename(turn: Any) -> Any:
    """A ShareGPT turn as `parse_messages` wants it, which judges whatever is wrong with it."""
    if not isinstance(turn, dict) or not isinstance(turn.get("from"), str):
        return turn
    return {"role": SHAREGPT_ROLES.get(turn["from"], turn["from"]), "content": turn.get("value")}
