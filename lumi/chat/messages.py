"""A conversation: messages with roles, and what makes one fit to learn from."""

import json
import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from lumi.host.text import utf8

ROLES = ("system", "user", "assistant")
ROLE_NAMES = {role: role for role in ROLES} | {"developer": "system"}  # OpenAI's name since 2024
TOOL_ROLES = frozenset(
    "tool function ipython function_call function_response observation tool_call tool_response".split()
)
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
# Non-empty, these change what a message means, and Lumi has no place for them.
UNSUPPORTED_FIELDS = tuple(
    "tool_calls tool_call_id function_call refusal audio audios image images video videos".split()
)
WEIGHT_FIELDS = ("weight", "train")  # whether an answer is trained: 1 or true, as all are
MESSAGE_FIELDS = ("role", "content", *REASONING_FIELDS, *UNSUPPORTED_FIELDS, *WEIGHT_FIELDS)
NO_PLACE_FOR = "no_place_for_"  # such reasons end with a name from the data


class Message(NamedTuple):
    """Who speaks, and the text; `reasoning` is what an assistant thought before it."""

    role: Literal["system", "user", "assistant"]
    content: str
    reasoning: str = ""


Conversation = tuple[Message, ...]


class MalformedConversation(ValueError):  # noqa: N818 - data that is counted, not a failure of the program
    """Data that is no conversation: `reason` is the key to count it under, the message says what is wrong."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


def parse_messages(data: Any) -> Conversation:
    """A conversation from plain JSON values: a list of {"role", "content"}, as OpenAI and others lay it out.

    The role "developer" means "system". A content may be a list of parts of type "text": they stand below
    each other. An assistant's message may have its reasoning in one of REASONING_FIELDS. Other fields count
    as names and notes, see `unknown_message_fields`.

    Raises:
        MalformedConversation: "malformed_messages" if it is not such a list; "null_content"; "unknown_role";
            "no_place_for_..." for the tools, images and weights of others: a role of TOOL_ROLES, a part of
            another type, or a non-empty field of UNSUPPORTED_FIELDS or WEIGHT_FIELDS, which it names.
    """
    if not isinstance(data, list | tuple) or not data:
        raise MalformedConversation(
            "malformed_messages", f"messages must be a list of at least one message, got {str(data)[:60]!r}"
        )
    return tuple(_parse_message(item, number) for number, item in enumerate(data, start=1))


def refuse_fields(data: dict[str, Any], names: Iterable[str], place: str) -> None:
    """Raises MalformedConversation for the first of these fields that is not empty."""
    for name in names:
        if not is_empty(data.get(name)):
            raise no_place_for(name, f"{place} has {name}, got {str(data[name])[:60]!r}")


def no_place_for(name: str, message: str) -> MalformedConversation:
    """The error for something that Lumi cannot train on; the reason ends with its name."""
    safe = name if re.fullmatch(r"\w{1,40}", name) else "other"
    return MalformedConversation(f"{NO_PLACE_FOR}{safe}", message)


def is_empty(value: Any) -> bool:
    """Whether a JSON value says nothing: null, blank, or made of such values; a table fills its gaps so."""
    if isinstance(value, str):
        return value.strip() in ("", "[]", "{}", "null")
    if isinstance(value, dict):
        return all(map(is_empty, value.values()))
    return value is None or (isinstance(value, list | tuple) and all(map(is_empty, value)))


def unknown_message_fields(data: Any, known: Iterable[str] = MESSAGE_FIELDS) -> list[str]:
    """The names of non-empty fields of messages that `parse_messages` does not read."""
    messages = [item for item in data if isinstance(item, dict)] if isinstance(data, list) else []
    found = (name for item in messages for name, value in item.items() if not is_empty(value))
    return list(dict.fromkeys(name for name in found if name not in known))


def _parse_message(item: Any, number: int) -> Message:
    place = f"message {number}"
    if not isinstance(item, dict) or not isinstance(item.get("role"), str) or "content" not in item:
        raise MalformedConversation(
            "malformed_messages", f"{place} must have a role and a content, got {str(item)[:60]!r}"
        )
    name = item["role"]
    if name in TOOL_ROLES:
        raise no_place_for(f"role_{name}", f"{place} has the role {name!r}")
    refuse_fields(item, UNSUPPORTED_FIELDS, place)
    if name not in ROLE_NAMES:
        raise MalformedConversation(
            "unknown_role", f"{place}: role must be one of {', '.join(ROLE_NAMES)}, got {name!r}"
        )
    role: Any = ROLE_NAMES[name]
    if role == "assistant":
        for name in WEIGHT_FIELDS:
            if item.get(name) not in (None, 1):
                raise no_place_for(name, f"{place} has the {name} {str(item[name])[:60]}")
        return Message(role, _parse_content(item["content"], place), _parse_reasoning(item, place))
    refuse_fields(item, REASONING_FIELDS, place)
    return Message(role, _parse_content(item["content"], place))


def _parse_reasoning(item: dict[str, Any], place: str) -> str:
    given = [item[name] for name in REASONING_FIELDS if not is_empty(item.get(name))]
    texts = {_parse_content(value, place) for value in given}  # servers write the same under two names
    if len(texts) > 1:
        fields = ", ".join(REASONING_FIELDS)
        raise MalformedConversation("malformed_messages", f"{place} must have one reasoning in {fields}")
    return texts.pop() if texts else ""


def _parse_content(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if content is None:
        raise MalformedConversation("null_content", f"{place} has a content that is null")
    if not isinstance(content, list):
        raise MalformedConversation(
            "malformed_messages", f"{place} must have a text or a list of parts, got {str(content)[:60]!r}"
        )
    return "\n".join(_parse_part(part, place) for part in content)  # as vLLM and llama.cpp join them


def _parse_part(part: Any, place: str) -> str:
    kind = part.get("type") if isinstance(part, dict) else None
    if isinstance(kind, str) and kind != "text":
        raise no_place_for(f"part_{kind}", f"{place} has a part of type {kind!r}")
    if kind is None or not isinstance(part.get("text"), str):
        expectation = 'each part must be {"type": "text", "text": ...}'
        raise MalformedConversation("malformed_messages", f"{place}: {expectation}, got {str(part)[:60]!r}")
    return part["text"]


def to_json(messages: Iterable[Message]) -> list[dict[str, str]]:
    """The plain JSON values that `parse_messages` reads; `reasoning_content` only where there is some."""
    return [
        {"role": message.role, "content": message.content}
        | ({"reasoning_content": message.reasoning} if message.reasoning else {})
        for message in messages
    ]


def from_json(data: Iterable[dict[str, Any]]) -> Conversation:
    """The conversation that `to_json` was given; unlike `parse_messages` it checks nothing."""
    return tuple(
        Message(message["role"], message["content"], message.get("reasoning_content") or "")
        for message in data
    )


def canonical(messages: Iterable[Message]) -> bytes:
    """What is hashed of a conversation: compact JSON in UTF-8. Raises UserError for a lone surrogate."""
    return utf8(json.dumps(to_json(messages), ensure_ascii=False, separators=(",", ":")))


def said(message: Message) -> tuple[str, ...]:
    """The texts of a message: its reasoning, if it has some, and its content."""
    return (message.reasoning, message.content) if message.reasoning else (message.content,)


def contents(messages: Iterable[Message]) -> str:
    """All that is said in order, a line end between the texts."""
    return "\n".join(text for message in messages for text in said(message))


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
