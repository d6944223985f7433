"""A document is a text, a conversation or a pair; a record is a document, or the reason why there is none."""

from typing import Any, Literal, NamedTuple

from lumi.chat.messages import Conversation, contents, from_json, to_json
from lumi.chat.pairs import Pair, pair_from_json, pair_to_json

Document = str | Conversation | Pair
Kind = Literal["texts", "conversations", "pairs"]  # what a corpus holds


class Record(NamedTuple):
    """A document, or None with the reason; `detail` says where the record stands and what is wrong."""

    document: Document | None
    reason: str = ""
    detail: str = ""


def text_of(document: Document) -> str:
    """The text itself, or the contents of all messages with a line end between them."""
    return document if isinstance(document, str) else contents(_messages(document))


def count_chars(document: Document) -> int:
    """The characters of a text, or of the contents of all messages."""
    if isinstance(document, str):
        return len(document)
    return sum(len(message.content) for message in _messages(document))


def to_plain(document: Document) -> Any:
    """The plain JSON values of a document."""
    if isinstance(document, str):
        return document
    return pair_to_json(document) if isinstance(document, Pair) else to_json(document)


def from_plain(data: Any, kind: Kind) -> Document:
    """The document that `to_plain` was given."""
    if kind == "texts":
        return data
    return pair_from_json(data) if kind == "pairs" else from_json(data)


def _messages(document: Conversation | Pair) -> Conversation:
    return document.messages if isinstance(document, Pair) else document
