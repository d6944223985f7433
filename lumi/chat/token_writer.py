"""Ids and loss mask of a conversation as they grow."""

from collections.abc import Mapping
from typing import Literal, NamedTuple, Protocol

import numpy as np

Follows = Literal["nothing", "control", "text"]  # what stands before a text that is encoded


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer, such as `lumi.tokenizer.tokenizer.Tokenizer`."""

    control_ids: Mapping[str, int]
    bos_id: int | None
    eos_id: int
    eos_ids: tuple[int, ...]
    pad_id: int | None
    token_bytes: np.ndarray
    chat_template: str | None

    def encode(self, text: str, follows: Follows = "nothing") -> list[int]:
        """Ids of plain text, never a control id. `follows`: what stands before the text."""
        ...

    def normalize(self, text: str) -> str:
        """The text as its ids spell it."""
        ...


class Rendered(NamedTuple):
    """A conversation to train on.

    Attributes:
        ids: token ids; the last one ends an answer.
        mask: for each id, whether it is trained.
        num_messages: how many messages of the conversation are in it.
    """

    ids: list[int]
    mask: list[bool]
    num_messages: int


class TokenWriter:
    """Text waits until a control token, an answer or `flush`, so that it is encoded in one piece."""

    def __init__(self, tokenizer: ChatTokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self._waiting: list[tuple[str, bool]] = []
        self._ends_in_control = False

    def control(self, token_id: int, *, trained: bool = False) -> None:
        """A control token."""
        self.flush()
        self._add([token_id], [trained])
        self._ends_in_control = True

    def text(self, text: str, *, trained: bool = False) -> None:
        """Text. A token is trained if a part of it is."""
        if text and self._waiting and self._waiting[-1][1] == trained:
            self._waiting[-1] = (self._waiting[-1][0] + text, trained)
        elif text:
            self._waiting.append((text, trained))

    def answer(self, text: str, *, trained: bool = True) -> None:
        """Text that is encoded by itself, as a model generates it."""
        self.flush()
        ids = self.tokenizer.encode(text, follows="text")
        self._add(ids, [trained] * len(ids))

    def flush(self) -> None:
        """Encode the waiting text."""
        pieces, self._waiting = self._waiting, []
        if not pieces:
            return
        follows: Follows = "control" if self._ends_in_control else "text"
        ids = self.tokenizer.encode("".join(text for text, _ in pieces), follows if self.ids else "nothing")
        self._add(ids, self._mask_of(ids, pieces))

    def _mask_of(self, ids: list[int], pieces: list[tuple[str, bool]]) -> list[bool]:
        if not any(trained for _, trained in pieces):
            return [False] * len(ids)
        ends = np.cumsum(self.tokenizer.token_bytes[ids])
        sizes = [len(self.tokenizer.normalize(text).encode()) for text, _ in pieces]
        sizes[0] += int(ends[-1]) - sum(sizes)  # a space that the tokenizer puts first
        trained = np.repeat([trained for _, trained in pieces], sizes)
        before = np.concatenate(([0], np.cumsum(trained)))  # trained bytes before each byte
        return (before[ends] > before[np.concatenate(([0], ends[:-1]))]).tolist()

    def _add(self, ids: list[int], mask: list[bool]) -> None:
        self.ids += ids
        self.mask += mask
        self._ends_in_control = False
