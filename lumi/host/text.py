"""Text as bytes. A Python string may hold lone surrogates, which UTF-8 cannot."""

from lumi.config import UserError


def utf8(text: str) -> bytes:
    """A text in UTF-8. Raises UserError with the place of a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        place = f"U+{ord(text[error.start]):04X} at character {error.start}"
        raise UserError("text", "must be valid Unicode", got=f"the lone surrogate {place}") from error
