"""A document is a text or a conversation; a record is a document, or the reason why there is none."""

from typing import NamedTuple

from lumi.chat.messages import Conversation, contents

Document = str | Conversation


class Record(NamedTuple):
    """A document, or None with the reason; `detail` says where the record stands and what is wrong."""

    document: Document | None
    reason: str = ""
    detail: str = ""


def text_of(document: Document) -> str:
    """The text itself, or the contents of a conversation with a line end between the messages."""
    return document if isinstance(document, str) else contents(document)


def count_chars(document: Document) -> int:
    """The characters of a text, or of all contents of a conversation."""
    return len(document) if isinstance(document, str) else sum(len(message.content) for message in document)
