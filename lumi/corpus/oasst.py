"""Trees of messages with ranked replies, as in OpenAssistant (Koepf et al. 2023, arXiv:2304.07327).

A tree gives one conversation: the path of the best-ranked replies. Rank 0 is the reply that people liked
most.
"""

import math
from dataclasses import dataclass
from typing import Any, Literal

from lumi.chat.messages import Conversation, MalformedConversation, Message
from lumi.corpus.conversations import Format, read_field, read_string

ROLES: dict[str, Literal["user", "assistant"]] = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True, kw_only=True)
class OasstFormat(Format):
    """A nested tree per record. `prompt` is a message: `text`, `role`, `rank`, `lang`, `deleted`, `replies`.

    `lang`: take only trees whose prompt has this language, according to the data.
    """

    kind: Literal["oasst"] = "oasst"
    lang: str | None = None
    required = ("prompt",)

    @property
    def optional(self) -> tuple[str, ...]:
        return ()

    def __post_init__(self) -> None:
        _check_lang(self.lang)

    def parse(self, record: dict[str, Any]) -> Conversation:
        return best_path(read_field(record, "prompt"), self.lang)


@dataclass(frozen=True, kw_only=True)
class OasstMessagesFormat(Format):
    """A message per row, as on the hub (OpenAssistant/oasst2). The rows of one tree count as one record.

    The rows of a tree may stand anywhere, so the source is read to its end and held in memory before its
    first tree.
    """

    kind: Literal["oasst_messages"] = "oasst_messages"
    # Keep only trees whose prompt is in this language, by the data's own label; null: all.
    lang: str | None = None
    required = ("message_id", "parent_id", "message_tree_id", "text", "role")

    @property
    def optional(self) -> tuple[str, ...]:
        return ("lang", "rank", "deleted")

    def __post_init__(self) -> None:
        _check_lang(self.lang)

    def unused(self, record: dict[str, Any]) -> list[str]:
        return [name for name in super().unused(record) if name != "rows"]

    def parse(self, record: dict[str, Any]) -> Conversation:
        # `reading` has joined the rows of the tree in the field "rows".
        nodes: dict[str, dict[str, Any]] = {}
        for row in record["rows"]:
            read_string(row, "message_tree_id")
            identity = read_string(row, "message_id")
            if identity in nodes:
                raise MalformedConversation(
                    "malformed_tree", f"message_id must stand once in a tree, got {identity!r} again"
                )
            nodes[identity] = row | {"replies": []}
        prompts = []
        for identity, node in nodes.items():
            parent_id = read_string(node, "parent_id", optional=True)
            if not parent_id:
                prompts.append(node)
            elif parent_id in nodes:
                nodes[parent_id]["replies"].append(node)
            else:
                raise MalformedConversation(
                    "malformed_tree",
                    f"parent_id must be a message of the same tree, got {parent_id!r}"
                    f" in message {identity!r}",
                )
        if len(prompts) != 1:
            raise MalformedConversation(
                "malformed_tree", f"a tree must have one message without a parent, got {len(prompts)}"
            )
        return best_path(prompts[0], self.lang)


def best_path(prompt: Any, lang: str | None) -> Conversation:
    """The messages from the prompt to a leaf, at each step by the reply of the lowest rank.

    A reply without a rank comes last; of equal ranks the first reply is taken. Deleted replies do not count.

    Raises:
        MalformedConversation: not a tree of messages ("malformed_tree"), another role ("unknown_role"), a
            prompt in a language other than `lang` ("other_language") or a deleted prompt ("deleted").
    """
    messages: list[Message] = []
    _check_node(prompt)
    if lang is not None and prompt.get("lang") != lang:
        raise MalformedConversation("other_language", "")
    if prompt.get("deleted"):
        raise MalformedConversation("deleted", "")
    node: Any = prompt
    while node is not None:
        role = read_string(node, "role")
        if role not in ROLES:
            raise MalformedConversation(
                "unknown_role", f"role must be one of {', '.join(ROLES)}, got {role!r}"
            )
        messages.append(Message(ROLES[role], read_string(node, "text")))
        node = _best_reply(node.get("replies") or [])
    return tuple(messages)


def _best_reply(replies: Any) -> dict[str, Any] | None:
    if not isinstance(replies, list):
        raise MalformedConversation("malformed_tree", f"replies must be a list, got {type(replies).__name__}")
    for reply in replies:
        _check_node(reply)
    return min((reply for reply in replies if not reply.get("deleted")), key=_rank, default=None)


def _rank(message: dict[str, Any]) -> float:
    rank = message.get("rank")
    return math.inf if rank is None or rank != rank else rank  # NaN: missing in a table


def _check_node(node: Any) -> None:
    if not isinstance(node, dict):
        raise MalformedConversation(
            "malformed_tree", f"a message must be an object, got {type(node).__name__}"
        )
    rank = node.get("rank")
    if rank is not None and (not isinstance(rank, int | float) or isinstance(rank, bool)):
        raise MalformedConversation("malformed_tree", f"rank must be a number, got {type(rank).__name__}")


def _check_lang(lang: str | None) -> None:
    if lang == "":
        raise ValueError('lang must be a code such as "en", or null for all, got ""')
