"""A document is a text, a conversation or a pair; a record is a document, or the reason why there is none."""

from typing import Any, Literal, NamedTuple

from lumi.chat.messages import Conversation, canonical, contents, from_json, said, to_json
from lumi.chat.pairs import Pair, pair_from_json, pair_to_json

Document = str | Conversation | Pair
Kind = Literal["texts", "conversations", "pairs"]  # what a corpus holds


class Attribution(NamedTuple):
    """The licence of a document and where it is from. "": its record does not say; None: nobody asked."""

    license: str | None = None
    url: str | None = None


class Record(NamedTuple):
    """A document, or None with the reason; `detail` says where the record stands and what is wrong.

    A document with a reason is dropped before any work. `unused`: the names of its fields that hold something
    and that nobody reads.
    """

    document: Document | None
    reason: str = ""
    detail: str = ""
    unused: tuple[str, ...] = ()
    attribution: Attribution = Attribution()


def text_of(document: Document) -> str:
    """The text itself, or all that is said in the messages with a line end between."""
    return document if isinstance(document, str) else contents(messages_of(document))


def bytes_of(document: Document) -> bytes:
    """The bytes that only equal documents share: of the text, or of JSON, of which a pair has three lines."""
    if isinstance(document, str):
        return document.encode()
    return b"\n".join(map(canonical, document)) if isinstance(document, Pair) else canonical(document)


def count_chars(document: Document) -> int:
    """The characters of a text, or of all that is said in the messages."""
    if isinstance(document, str):
        return len(document)
    return sum(len(text) for message in messages_of(document) for text in said(message))


def messages_of(document: Conversation | Pair) -> Conversation:
    """All messages of a conversation or a pair."""
    return document.messages if isinstance(document, Pair) else document


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
