"""A conversation: messages with roles, and what makes one fit to learn from."""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

ROLES = ("system", "user", "assistant")


class Message(NamedTuple):
    """One turn: who speaks, and the text."""

    role: Literal["system", "user", "assistant"]
    content: str


Conversation = tuple[Message, ...]


class MalformedConversation(ValueError):  # noqa: N818 - it is a finding, counted by its reason, not a failure of the program
    """`reason` is the key it is counted under, the message says what is wrong."""

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


def parse_messages(data: Any) -> Conversation:
    """Plain JSON values, a list of {"role", "content"}, as a conversation; roles are system, user and assistant.

    Raises:
        MalformedConversation: not such a list ("malformed_messages"), another role ("unknown_role").
    """
    if not isinstance(data, list | tuple) or not data:
        raise MalformedConversation(
            "malformed_messages", f"messages must be a list of at least one message, got {str(data)[:60]!r}"
        )
    messages = []
    for number, item in enumerate(data, start=1):
        if (
            not isinstance(item, dict)
            or not isinstance(item.get("role"), str)
            or not isinstance(item.get("content"), str)
        ):
            raise MalformedConversation(
                "malformed_messages",
                f"message {number} must have a role and a content, got {str(item)[:60]!r}",
            )
        if item["role"] not in ROLES:
            raise MalformedConversation(
                "unknown_role",
                f"message {number}: role must be one of {', '.join(ROLES)}, got {item['role']!r}",
            )
        messages.append(Message(item["role"], item["content"]))
    return tuple(messages)


def to_json(messages: Sequence[Message]) -> list[dict[str, str]]:
    """The plain JSON values that `parse_messages` reads."""
    return [message._asdict() for message in messages]


def find_disorder(messages: Sequence[Message]) -> str:
    """The reason why the roles make no conversation that can be trained on, or "".

    "system_not_first": a system message after the first place. "roles_do_not_alternate": what follows is not user, assistant, user ...
    "no_answer": there is no assistant message.
    """
    spoken = [message.role for message in messages]
    if "system" in spoken[1:]:
        return "system_not_first"
    spoken = [role for role in spoken if role != "system"]
    if any(role != ("user", "assistant")[index % 2] for index, role in enumerate(spoken)):
        return "roles_do_not_alternate"
    return "" if "assistant" in spoken else "no_answer"
