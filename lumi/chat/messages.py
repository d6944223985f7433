"""A conversation: messages with roles, and what makes one fit to learn from."""

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """Who speaks, and the text."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Message, ...]


class MalformedConversation(ValueError):  # noqa: N818 - data that is counted, not a failure of the program
    """Data that is no conversation: `reason` is the key to count it under, the message says what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse_messages(data: Any) -> Conversation:
    """A conversation from plain JSON values: a list of {"role", "content"}.

    Raises:
        MalformedConversation: "malformed_messages" if it is not such a list; "unknown_role" for a role other
            than system, user and assistant.
    """
    if not isinstance(data, list | tuple) or not data:
        raise MalformedConversation(
            "malformed_messages", f"messages must be a list of at least one message, got {str(data)[:60]!r}"
        )
    return tuple(_parse_message(item, number) for number, item in enumerate(data, start=1))


def _parse_message(item: Any, number: int) -> Message:
    role, content = (item.get("role"), item.get("content")) if isinstance(item, dict) else (None, None)
    if not isinstance(role, str) or not isinstance(content, str):
        raise MalformedConversation(
            "malformed_messages", f"message {number} must have a role and a content, got {str(item)[:60]!r}"
        )
    if role not in ROLES:
        raise MalformedConversation(
            "unknown_role", f"message {number}: role must be one of {', '.join(ROLES)}, got {role!r}"
        )
    return Message(item["role"], content)


def to_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The plain JSON values that `parse_messages` reads."""
    return [message._asdict() for message in messages]


def from_json(data: Iterable[dict[str, Any]]) -> Conversation:
    """The conversation that `to_json` was given; unlike `parse_messages` it checks nothing."""
    return tuple(Message(**message) for message in data)


def contents(messages: Sequence[Message]) -> str:
    """All contents in order, a line end between the messages."""
    return "\n".join(message.content for message in messages)


def find_disorder(messages: Sequence[Message]) -> str:
    """Why a model cannot be trained on these roles in this order, or "" if it can.

    "system_not_first": a system message after the first place. "roles_do_not_alternate": the others are not
    user, assistant, user ... "no_answer": there is no assistant message.
    """
    spoken = [message.role for message in messages]
    if "system" in spoken[1:]:
        return "system_not_first"
    spoken = [role for role in spoken if role != "system"]
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(spoken)):
        return "roles_do_not_alternate"
    return "" if "assistant" in spoken else "no_answer"
