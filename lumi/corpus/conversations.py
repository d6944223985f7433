"""The formats that chat data comes in: the config of each, and how it reads a record as a conversation."""

import abc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

from lumi.chat.messages import (
    MESSAGE_FIELDS,
    UNSUPPORTED_FIELDS,
    Conversation,
    MalformedConversation,
    Message,
    is_empty,
    parse_messages,
    refuse_fields,
    unknown_message_fields,
)
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
SHAREGPT_FIELDS = ("from", "value", *MESSAGE_FIELDS)
# Of a record, as UNSUPPORTED_FIELDS of a message: non-empty, they change what it means.
UNSUPPORTED = ("tools", "functions", *UNSUPPORTED_FIELDS)


class Format(abc.ABC):
    """One format. `required` and `optional` name the fields that it reads; `unused` finds the others."""

    @property
    @abc.abstractmethod
    def required(self) -> tuple[str, ...]:
        """Fields without which there is no conversation."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Fields that may be missing."""
        return tuple(name for name in UNSUPPORTED if name not in self.required)

    def read(self, record: dict[str, Any]) -> Conversation | Pair:
        """The conversation or the pair in a record.

        Raises MalformedConversation with the reason to count it under.
        """
        document = self.parse(record)
        refuse_fields(record, (name for name in UNSUPPORTED if name in self.optional), "the record")
        return document

    @abc.abstractmethod
    def parse(self, record: dict[str, Any]) -> Conversation | Pair:
        """As `read`, without a look at fields that Lumi has no place for."""

    def unused(self, record: dict[str, Any]) -> list[str]:
        """The names of non-empty fields that `read` ignores; of messages as "messages[].name"."""
        known = self.required + self.optional
        return [name for name, value in record.items() if name not in known and not is_empty(value)]


@dataclass(frozen=True, kw_only=True)
class AlpacaFormat(Format):
    """`instruction` and `output`, perhaps `input`, `system` and `history`, pairs of question and answer.

    The input goes below the instruction. An input or a system message that is blank counts as missing.
    """

    kind: Literal["alpaca"] = "alpaca"
    required = ("instruction", "output")

    @property
    def optional(self) -> tuple[str, ...]:
        return ("input", "system", "history", *super().optional)

    def parse(self, record: dict[str, Any]) -> Conversation:
        question = _join(read_string(record, "instruction"), read_string(record, "input", optional=True))
        return _exchange(record, question, read_string(record, "output"))


@dataclass(frozen=True, kw_only=True)
class DollyFormat(Format):
    """`instruction` and `response`, perhaps `context`, and `system` and `history` as in "alpaca".

    The context goes below the instruction, where the authors of the dataset put it (databrickslabs/dolly).
    """

    kind: Literal["dolly"] = "dolly"
    required = ("instruction", "response")

    @property
    def optional(self) -> tuple[str, ...]:
        return ("context", "system", "history", *super().optional)

    def parse(self, record: dict[str, Any]) -> Conversation:
        question = _join(read_string(record, "instruction"), read_string(record, "context", optional=True))
        return _exchange(record, question, read_string(record, "response"))


@dataclass(frozen=True, kw_only=True)
class MessagesFormat(Format):
    """A list of {"role", "content"} in `field`, perhaps a system message in `system`."""

    kind: Literal["messages"] = "messages"
    # The field that holds the list of messages.
    field: str = "messages"

    def __post_init__(self) -> None:
        check_names(field=self.field)

    @property
    def required(self) -> tuple[str, ...]:
        return (self.field,)

    @property
    def optional(self) -> tuple[str, ...]:
        return ("system", *super().optional)

    def parse(self, record: dict[str, Any]) -> Conversation:
        return with_system(record, parse_messages(read_field(record, self.field)))

    def unused(self, record: dict[str, Any]) -> list[str]:
        return [*super().unused(record), *unused_in_messages(record, self.required)]


@dataclass(frozen=True, kw_only=True)
class ShareGptFormat(Format):
    """A list of {"from", "value"} in `field`, perhaps a system message in `system`.

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

    @property
    def optional(self) -> tuple[str, ...]:
        return ("system", *super().optional)

    def parse(self, record: dict[str, Any]) -> Conversation:
        messages = read_field(record, self.field)
        if isinstance(messages, list) and self.answer_field is not None:
            messages = [*messages, read_field(record, self.answer_field)]
        if isinstance(messages, list):
            messages = [rename(message) for message in messages]
        return with_system(record, parse_messages(messages))

    def unused(self, record: dict[str, Any]) -> list[str]:
        return [*super().unused(record), *unused_in_messages(record, self.required, SHAREGPT_FIELDS)]


@dataclass(frozen=True, kw_only=True)
class PromptResponseFormat(Format):
    """A question and its answer in two fields, perhaps a system message in a third.

    `history` is read as in "alpaca".
    """

    kind: Literal["prompt_response"] = "prompt_response"
    # The field with the question.
    prompt_field: str = "prompt"
    # The field with the answer.
    response_field: str = "response"
    # The field with the system message; null: `system`, where a record has it.
    system_field: str | None = None

    def __post_init__(self) -> None:
        check_names(
            prompt_field=self.prompt_field, response_field=self.response_field, system_field=self.system_field
        )

    @property
    def required(self) -> tuple[str, ...]:
        fields = (self.prompt_field, self.response_field)
        return fields if self.system_field is None else (*fields, self.system_field)

    @property
    def optional(self) -> tuple[str, ...]:
        names = ("history",) if self.system_field is not None else ("history", "system")
        return (*(name for name in names if name not in self.required), *super().optional)

    def parse(self, record: dict[str, Any]) -> Conversation:
        question, answer = read_string(record, self.prompt_field), read_string(record, self.response_field)
        names = self.optional if self.system_field is None else (self.system_field, *self.optional)
        before = {name: record.get(name) for name in names}  # the question itself may stand in "history"
        return _exchange(before, question, answer, self.system_field or "system")


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


def unused_in_messages(
    record: dict[str, Any], fields: Iterable[str], known: Iterable[str] = MESSAGE_FIELDS
) -> Iterator[str]:
    """The names of non-empty fields of the messages, or the one message, in these fields of a record."""
    for field in fields:
        value = record.get(field)
        for name in unknown_message_fields(value if isinstance(value, list) else [value], known):
            yield f"{field}[].{name}"


def _exchange(
    record: dict[str, Any], question: str, answer: str, system_field: str = "system"
) -> Conversation:
    """The system message of a record, its earlier turns, and its own question and answer."""
    own = (Message("user", question), Message("assistant", answer))
    return with_system(record, (*read_history(record), *own), system_field)


def read_history(record: dict[str, Any]) -> Conversation:
    """The earlier turns in the field `history`, pairs of question and answer."""
    history = record.get("history")
    pairs: list[Any] = [] if is_empty(history) else history if isinstance(history, list) else [history]
    for pair in pairs:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not all(isinstance(x, str) for x in pair):
            raise MalformedConversation(
                "wrong_type", f"'history' must be a list of [question, answer], got {str(pair)[:60]!r} in it"
            )
    turns = ((Message("user", asked), Message("assistant", answered)) for asked, answered in pairs)
    return tuple(message for turn in turns for message in turn)


def with_system(record: dict[str, Any], messages: Conversation, system_field: str = "system") -> Conversation:
    """Messages after the system message in a field of their record; their own must be the same, or blank."""
    system = read_string(record, system_field, optional=True)
    if not system.strip():
        return messages
    if messages[0].role == "system":
        if messages[0].content.strip() not in ("", system.strip()):
            raise MalformedConversation(
                "two_system_messages",
                f"the field {system_field!r} and message 1 differ: {messages[0].content[:60]!r}",
            )
        messages = messages[1:]
    return (Message("system", system), *messages)


def _join(instruction: str, context: str) -> str:
    return f"{instruction}\n\n{context}" if context.strip() else instruction


def rename(message: Any) -> Any:
    """A message of ShareGPT in the form of `parse_messages`, which then finds whatever is wrong with it.

    Any other message stays as it is.
    """
    if not isinstance(message, dict) or not isinstance(message.get("from"), str):
        return message
    renamed = message | {"role": SHAREGPT_ROLES.get(message["from"], message["from"])}
    return renamed | {"content": message["value"]} if "value" in message else renamed
