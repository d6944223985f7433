"""The text of tokens as they come, up to the first of some strings that end it."""

from collections.abc import Sequence

from lumi.tokenizer.tokenizer import StreamDecoder, Tokenizer


class StoppingText:
    """Decodes ids one by one. What may be the beginning of a stop string is held back until it is decided.

    Attributes:
        stopped: a stop string came. It and what follows it are left out.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self._decoder, self._stops = StreamDecoder(tokenizer), stops
        self._held = ""
        self.stopped = False

    def feed(self, token_id: int) -> str:
        """The text that this token completes, possibly none."""
        self._held += self._decoder.feed(token_id)
        found = [(place, stop) for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if found:  # the one that is complete first counts, however the text is cut into tokens
            self.stopped = True
            return self._take(min((place + len(stop), place) for place, stop in found)[1])
        return self._take(len(self._held) - max(map(self._begun, self._stops), default=0))

    def flush(self) -> str:
        """What is held back when the ids end by themselves."""
        self._held += self._decoder.flush()
        return "" if self.stopped else self._take(len(self._held))

    def _begun(self, stop: str) -> int:
        """How many characters of a stop string the held text ends with."""
        lengths = range(min(len(stop) - 1, len(self._held)), 0, -1)
        return next((length for length in lengths if self._held.endswith(stop[:length])), 0)

    def _take(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text
