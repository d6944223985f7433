"""What an evaluation requires of the records that it reads.

What is evaluated decides a published figure, so nothing is skipped here: a record that cannot be read is an
error.
"""

from lumi.config import UserError
from lumi.corpus.raw_records import Fields
from lumi.host.text import utf8


def text_field(record: Fields, name: str, place: str) -> str:
    """A field that must be a string of valid Unicode. Raises UserError naming the place and the field."""
    value = record.get(name)
    if not isinstance(value, str):
        got = type(value).__name__
        if name not in record:
            got = f"no such field (it has {', '.join(record) or 'none'})"
        raise UserError(f"{place}: {name!r}", "must be a string", got=got)
    check_unicode(value, name, place)
    return value


def check_unicode(text: str, name: str, place: str) -> None:
    """Raises UserError naming the place and the field of a text that cannot be encoded."""
    try:
        utf8(text)
    except UserError as error:
        raise error.within(f"{place}: {name!r}") from error


def tightest(*limits: int | None) -> int | None:
    """The smallest limit; None is no limit."""
    return min((limit for limit in limits if limit is not None), default=None)
