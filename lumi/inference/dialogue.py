"""A conversation with a model: `Dialogue` remembers and answers, `converse` is the loop between it and a person or a pipe."""

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lumi.chat import rendering as chat
from lumi.chat.messages import Message
from lumi.config import UserError
from lumi.host.text import utf8
from lumi.inference.generation import SamplingConfig, filler_id, generate_ids
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import StreamDecoder, Tokenizer


class Answer(NamedTuple):
    """What the model said; `stopped`: it ended by itself, `num_forgotten`: turns dropped from the conversation to make room for it."""

    text: str
    num_tokens: int
    stopped: bool
    interrupted: bool
    num_forgotten: int


class Turn(NamedTuple):
    """A question and its answer."""

    user: Message
    assistant: Message


class Dialogue:
    """A conversation of many turns.

    Args:
        model: in evaluation mode.
        tokenizer: its chat template gives the prompts.
        sampling: of every answer; the seed moves on by one with each, so that a question asked again may be answered differently.
        system: stands before every conversation; None or empty: nothing does.

    Attributes:
        system: the system message; `set_system` changes it.
        turns: what is remembered, the oldest first.
        max_prompt_tokens: of the model's positions, what is not kept free for an answer.

    Raises:
        UserError: the tokenizer's chat template cannot be used, or the system message is refused by it or too long.
    """

    def __init__(
        self, model: Transformer, tokenizer: Tokenizer, sampling: SamplingConfig, system: str | None = None
    ):
        self.model, self.tokenizer, self.sampling = model, tokenizer, sampling
        self._num_answers = 0
        positions = model.config.max_positions
        self.max_prompt_tokens = positions - min(sampling.max_new_tokens, positions // 2)
        self.set_system(system)

    def set_system(self, system: str | None) -> None:
        """Forget all turns and begin with another system message; None or empty: with none.

        Raises:
            UserError: it is too long, not valid Unicode, or refused by the chat template; everything is as it was then.
        """
        utf8(
            system or ""
        )  # before the template stands around it: the place of an error is counted in what was written
        if (shortest := len(self._prompt(system, [], Message("user", "?")))) > self.max_prompt_tokens:
            raise UserError(
                f"the system message must leave room for a question within {self.max_prompt_tokens} tokens (the model's "
                f"{self.model.config.max_positions} positions, less room for the answer), got a prompt of {shortest}; shorten it or "
                "lower --max-new-tokens"
            )
        self.system = system
        self.turns: list[Turn] = []

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns = []

    def answer(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Answer a message and remember both. The oldest turns are forgotten, whole, while the conversation is too long.

        Args:
            text: what the user says.
            on_text: gets the answer piece by piece, whole characters only. A KeyboardInterrupt, here or in the model, ends the answer:
                what came until then is remembered, or nothing of this turn if nothing came.

        Raises:
            UserError: the message is too long even alone, or is not valid Unicode; nothing is forgotten then.
        """
        utf8(text)  # as in `set_system`
        user = Message("user", text)
        turns = list(self.turns)
        while len(prompt := self._prompt(self.system, turns, user)) > self.max_prompt_tokens:
            if not turns:
                raise UserError(
                    f"a message must fit into {self.max_prompt_tokens} tokens (the model's {self.model.config.max_positions} positions, "
                    f"less room for the answer) with template and system message, got {len(prompt)}; shorten it"
                )
            del turns[0]
        answer = self._generate(prompt, on_text)._replace(num_forgotten=len(self.turns) - len(turns))
        if answer.text or not answer.interrupted:
            turns.append(Turn(user, Message("assistant", answer.text)))
        self.turns = turns
        return answer

    def _prompt(self, system: str | None, turns: Sequence[Turn], user: Message) -> list[int]:
        first = [Message("system", system)] if system else []
        return chat.prompt_ids(
            self.tokenizer, [*first, *(message for turn in turns for message in turn), user]
        )

    def _generate(self, prompt: Sequence[int], on_text: Callable[[str], None]) -> Answer:
        decoder, pieces, ids = StreamDecoder(self.tokenizer), list[str](), list[int]()

        def pass_on(piece: str) -> None:
            if piece:
                pieces.append(piece)
                on_text(piece)

        def on_token(_row: int, token: int) -> None:
            ids.append(token)
            pass_on(decoder.feed(token))

        config = replace(self.sampling, seed=(self.sampling.seed + self._num_answers) % 2**63)
        self._num_answers += 1
        stopped = interrupted = False
        try:
            [completion] = generate_ids(
                self.model,
                [prompt],
                config,
                stop_ids=chat.stop_ids(self.tokenizer),
                pad_id=filler_id(self.tokenizer),
                vocab_size=self.tokenizer.vocab_size,
                on_token=on_token,
            )
            stopped = completion.stopped
            pass_on(decoder.flush())
        except KeyboardInterrupt:
            interrupted = True
        return Answer("".join(pieces), len(ids), stopped, interrupted, 0)


HELP = """\
/reset         forget the conversation
/undo          forget the last question and its answer
/system TEXT   forget the conversation and begin it with another system message; without TEXT, with none
/help          this list
/exit          leave, as does Ctrl-D; Ctrl-C stops an answer"""


def converse(dialogue: Dialogue) -> int:
    """Read messages from stdin, a line each, and print answers as they come, until the input ends or /exit.

    On a terminal with a prompt and line editing. From or to a pipe, answers alone go to stdout; Ctrl-C then ends the program.

    Returns:
        The exit code: 2 if a message from a pipe was refused, otherwise 0.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]  # the tokenizer names what is no UTF-8
    if interactive:
        with contextlib.suppress(ImportError):  # not on Windows
            import readline  # noqa: F401 - gives input() its editing and history
        print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    num_refused = num_interrupts = 0
    while True:
        try:
            line = input("> " if interactive else "")
            num_interrupts = 0
            if line.strip() == "/exit":
                break
            num_refused += not _turn(dialogue, line, interactive)
        except EOFError:
            if interactive:
                print()
            break
        except KeyboardInterrupt:
            num_interrupts += 1
            if not interactive:
                raise
            print()
            if num_interrupts == 2:
                break
            _note("Ctrl-C again leaves, as do /exit and Ctrl-D")
    return 2 if num_refused and not interactive else 0


def _turn(dialogue: Dialogue, line: str, interactive: bool) -> bool:
    """Obey a command or answer a message; False if it was refused."""
    if not line.strip():
        return True
    try:
        if command := re.fullmatch(r"\s*/([a-z]+)(?:\s+(.*))?", line, re.DOTALL):
            _obey(dialogue, command[1], (command[2] or "").strip())
            return True
        answer = dialogue.answer(line, lambda piece: print(piece, end="", flush=True))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return False
    print()
    if answer.interrupted:
        if not interactive:
            raise KeyboardInterrupt
        _note("interrupted")
    elif not answer.stopped:
        _note(f"cut after {answer.num_tokens} tokens")
    if answer.num_forgotten:
        turns = "turn was" if answer.num_forgotten == 1 else f"{answer.num_forgotten} turns were"
        _note(
            f"the conversation outgrew the model's {dialogue.model.config.max_positions} positions: the oldest {turns} forgotten"
        )
    return True


def _obey(dialogue: Dialogue, command: str, rest: str) -> None:
    if command == "system":
        dialogue.set_system(rest)
        _note(
            "a new conversation, with this system message"
            if rest
            else "a new conversation, without a system message"
        )
    elif command in ("reset", "undo", "help") and not rest:
        if command == "reset":
            dialogue.reset()
            _note("a new conversation")
        elif command == "undo":
            dialogue.turns = dialogue.turns[:-1]
            _note(f"turns that are left: {len(dialogue.turns)}")
        else:
            print(HELP, file=sys.stderr)
    else:
        raise UserError(
            f"a command must be /reset, /undo, /system TEXT, /help or /exit, got /{command} {rest}".rstrip()
        )


def _note(text: str) -> None:
    """A remark that is no part of an answer: on a terminal among the answers, apart from them in a pipe."""
    print(f"[{text}]", file=sys.stderr, flush=True)
