"""The formats that chat data comes in: the config of each, and how it reads a record as a conversation."""

import abc
from dataclasses import dataclass
from typing import Any, Literal

from lumi.chat.messages import Conversation, MalformedConversation, Message, parse_messages
from lumi.chat.pairs import Pair

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
    """One format. `required` and `optional` name the fields that it reads; it ignores all others."""

    @property
    @abc.abstractmethod
    def required(self) -> tuple[str, ...]:
        """Fields without which there is no conversation."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields that may be missing."""
        return ()

    @abc.abstractmethod
    def read(self, record: dict[str, Any]) -> Conversation | Pair:
        """The conversation or the pair in a record.

        Raises MalformedConversation with the reason to count it under.
        """


@dataclass(frozen=True, kw_only=True)
class AlpacaFormat(Format):
    """`instruction` and `output`, perhaps `input` and `system`.

    The input goes below the instruction. An input or a system message that is blank counts as missing.
    """

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
    """`instruction` and `response`, perhaps `context`.

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
    # The field that holds the list of messages.
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
    """A list of {"from", "value"} in `field`.

    In files of preferences `answer_field` ("chosen") holds the last message, in the same form.
    """

    kind: Literal["sharegpt"] = "sharegpt"
    # The field that holds the list of turns.
    field: str = "conversations"
    # The field with one more turn, the preferred answer; null: there is none.
    answer_field: str | None = None

    def __post_init__(self) -> None:
        check_names(field=self.field, answer_field=self.answer_field)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.field,) if self.answer_field is None else (self.field, self.answer_field)

    def read(self, record: dict[str, Any]) -> Conversation:
        messages = read_field(record, self.field)
        if isinstance(messages, list) and self.answer_field is not None:
            messages = [*messages, read_field(record, self.answer_field)]
        if isinstance(messages, list):
            messages = [rename(message) for message in messages]
        return parse_messages(messages)


@dataclass(frozen=True, kw_only=True)
class PromptResponseFormat(Format):
    """A question and its answer in two fields, and perhaps a system message in a third."""

    kind: Literal["prompt_response"] = "prompt_response"
    # The field with the question.
    prompt_field: str = "prompt"
    # The field with the answer.
    response_field: str = "response"
    # The field with the system message; null: there is none.
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


def read_field(record: dict[str, Any], name: str) -> Any:
    """The value of a field. Raises MalformedConversation if there is none."""
    if record.get(name) is None:
        fields = ", ".join(map(repr, record)) or "no fields"
        raise MalformedConversation("missing_text", f"no field {name!r}; it has {fields}"[:300])
    return record[name]


def read_string(record: dict[str, Any], name: str, *, optional: bool = False) -> str:
    """The text of a field; "" if it is optional and missing. Raises MalformedConversation."""
    value = (record.get(name) or "") if optional else read_field(record, name)
    if not isinstance(value, str):
        raise MalformedConversation("wrong_type", f"{name!r} must be a string, got {type(value).__name__}")
    return value


def check_names(**fields: str | None) -> None:
    """Raises ValueError if the name of a field is empty, or two fields have the same name."""
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


def rename(message: Any) -> Any:
    """A message of ShareGPT in the form of `parse_messages`, which then finds whatever is wrong with it.

    Any other message stays as it is.
    """
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        return message
    return {"role": SHAREGPT_ROLES.get(message["from"], message["from"]), "content": message.get("value")}
