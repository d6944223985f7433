"""The records that an evaluation reads, in order, from the locations of `lumi.corpus.sources`.

What is evaluated decides a published figure, so nothing is skipped here: a record that cannot be read is an
error.
"""

from itertools import islice
from typing import Any

from lumi.config import UserError
from lumi.corpus.raw_records import Piece, RawRecord, read_pieces
from lumi.corpus.sources import Location, describe
from lumi.host.text import utf8

Fields = dict[str, Any]  # of one record


def read_records(location: Location, limit: int | None = None) -> list[Fields]:
    """The first `limit` records of a location (None: all) in its order; a text file is {"text": ...}.

    Raises:
        UserError: a path matches no file, a file or a line cannot be read (names the line), the hub cannot be
            reached, or there are no records.
    """
    records = list(map(_require, islice(read_pieces(location), limit)))
    if not records:
        raise UserError(f"{describe(location)}:", "must hold at least one record", got="none")
    return records


def _require(piece: Piece) -> Fields:
    if isinstance(piece, RawRecord):
        return piece.fields
    if not isinstance(piece.document, str):
        raise UserError(piece.detail)
    return {"text": piece.document.replace("\r\n", "\n").replace("\r", "\n")}


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
