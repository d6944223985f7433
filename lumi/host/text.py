"""Text that can be written down: a lone surrogate is no character."""

from lumi.config import UserError


def utf8(text: str) -> bytes:
    """A text in UTF-8. Raises UserError naming the place of a lone surrogate."""
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"text must be valid Unicode, got the lone surrogate U+{ord(text[error.start]):04X} at character {error.start}"
        ) from error
