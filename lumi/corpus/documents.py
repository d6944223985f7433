"""A document is a text or a conversation; a record is a document, or the reason why there is none."""

from typing import NamedTuple

from lumi.chat.messages import Conversation, canonical, contents, said

Document = str | Conversation


class Record(NamedTuple):
    """A document, or None with the reason; `detail` says where the record stands and what is wrong.

    `unused`: the names of its fields that hold something and that nobody reads.
    """

    document: Document | None
    reason: str = ""
    detail: str = ""
    unused: tuple[str, ...] = ()


def text_of(document: Document) -> str:
    """The text itself, or all that is said in a conversation with a line end between."""
    return document if isinstance(document, str) else contents(document)


def bytes_of(document: Document) -> bytes:
    """The bytes that only equal documents share: of the text, or of a conversation's JSON."""
    return document.encode() if isinstance(document, str) else canonical(document)


def count_chars(document: Document) -> int:
    """The characters of a text, or of all that is said in a conversation."""
    if isinstance(document, str):
        return len(document)
    return sum(len(text) for message in document for text in said(message))
