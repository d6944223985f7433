"""A conversation with a model: `Dialogue` remembers and answers, `converse` reads a terminal or a pipe."""

import contextlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from lumi.chat.messages import Message
from lumi.chat.rendering import prompt_ids, stop_ids
from lumi.config import UserError
from lumi.host.text import utf8
from lumi.inference.generation import SamplingConfig, filler_id, generate_ids
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import StreamDecoder, Tokenizer


class Answer(NamedTuple):
    """What the model said."""

    text: str
    num_tokens: int
    stopped: bool  # by the model itself, not by a limit
    interrupted: bool  # by a KeyboardInterrupt
    num_forgotten: int  # old exchanges that made room for this one


class Exchange(NamedTuple):
    """A question and its answer."""

    user: Message
    assistant: Message


class Dialogue:
    """A conversation of many exchanges.

    Args:
        model: in evaluation mode.
        tokenizer: its chat template makes the prompts.
        sampling: of every answer. Each one adds 1 to the seed: a repeated question may get another answer.
        system: the system message, which stands before every conversation; None or empty: there is none.

    Attributes:
        system: the system message; `set_system` changes it.
        exchanges: what is remembered, the oldest first.
        max_prompt_tokens: the model's positions, less the room for an answer.

    Raises:
        UserError: the tokenizer has no usable chat template, or the system message is refused or too long.
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
        """Forget all exchanges and begin with another system message; None or empty: with none.

        Raises:
            UserError: it is too long, not valid Unicode, or refused by the chat template. Nothing changes
                then.
        """
        utf8(
            system or ""
        )  # here and not in the template's text: an error names the place in the user's own text
        shortest = len(self._prompt(system, [], Message("user", "?")))
        if shortest > self.max_prompt_tokens:
            raise UserError(
                "the system message",
                f"must leave room for a question within {self._room()}",
                got=f"a prompt of {shortest}",
                remedy="shorten it or lower --max-new-tokens",
            )
        self.system = system
        self.exchanges: list[Exchange] = []

    def reset(self) -> None:
        """Forget all exchanges. The system message stays."""
        self.exchanges = []

    def answer(self, text: str, on_text: Callable[[str], None]) -> Answer:
        """Answer a message and remember both. While the conversation is too long, forget the oldest exchange.

        Args:
            text: the user's message.
            on_text: called with each new piece of the answer, in whole characters. A KeyboardInterrupt, here
                or in the model, ends the answer. What came before it is remembered; an exchange without text
                is not.

        Raises:
            UserError: the message is too long even alone, or is not valid Unicode. Nothing is forgotten then.
        """
        utf8(text)  # as in `set_system`
        user = Message("user", text)
        exchanges = list(self.exchanges)
        while len(prompt := self._prompt(self.system, exchanges, user)) > self.max_prompt_tokens:
            if not exchanges:
                expectation = f"must fit into {self._room()} with template and system message"
                raise UserError("a message", expectation, got=len(prompt), remedy="shorten it")
            del exchanges[0]
        num_forgotten = len(self.exchanges) - len(exchanges)
        answer = self._generate(prompt, on_text)._replace(num_forgotten=num_forgotten)
        if answer.text or not answer.interrupted:
            exchanges.append(Exchange(user, Message("assistant", answer.text)))
        self.exchanges = exchanges
        return answer

    def _room(self) -> str:
        positions = f"the model's {self.model.config.max_positions} positions, less room for the answer"
        return f"{self.max_prompt_tokens} tokens ({positions})"

    def _prompt(self, system: str | None, exchanges: Sequence[Exchange], user: Message) -> list[int]:
        first = [Message("system", system)] if system else []
        said = [message for exchange in exchanges for message in exchange]
        return prompt_ids(self.tokenizer, [*first, *said, user])

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
                stop_ids=stop_ids(self.tokenizer),
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
    """Read messages from stdin, one a line, and print answers as they come, until /exit or the end.

    A terminal gets a prompt and line editing. With a pipe, only answers go to stdout, and Ctrl-C ends the
    program.

    Returns:
        The exit code: 2 if a message from a pipe was refused, otherwise 0.
    """
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    # Bytes that are not UTF-8 become lone surrogates, which `Dialogue.answer` refuses with their place.
    sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")  # type: ignore[union-attr]
    if interactive:
        with contextlib.suppress(ImportError):  # Windows has none
            import readline  # noqa: F401 - gives input() its editing and history
        print("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    num_refused = num_interrupts = 0
    while True:
        try:
            line = input("> " if interactive else "")
            num_interrupts = 0
            if line.strip() == "/exit":
                break
            if not _handle(dialogue, line, interactive):
                num_refused += 1
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


def _handle(dialogue: Dialogue, line: str, interactive: bool) -> bool:
    """Obey a command or answer a message. Returns False if it was refused."""
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
        positions = f"the model's {dialogue.model.config.max_positions} positions"
        turns = "turn was" if answer.num_forgotten == 1 else f"{answer.num_forgotten} turns were"
        _note(f"the conversation outgrew {positions}: the oldest {turns} forgotten")
    return True


def _obey(dialogue: Dialogue, command: str, rest: str) -> None:
    if command == "system":
        dialogue.set_system(rest)
        message = "with this system message" if rest else "without a system message"
        _note(f"a new conversation, {message}")
    elif command in ("reset", "undo", "help") and not rest:
        if command == "reset":
            dialogue.reset()
            _note("a new conversation")
        elif command == "undo":
            dialogue.exchanges = dialogue.exchanges[:-1]
            _note(f"turns that are left: {len(dialogue.exchanges)}")
        else:
            print(HELP, file=sys.stderr)
    else:
        got = f"/{command} {rest}".rstrip()
        raise UserError("a command", "must be /reset, /undo, /system TEXT, /help or /exit", got=got)


def _note(text: str) -> None:
    """Print a remark that is not part of an answer, on stderr: pipes get answers alone."""
    print(f"[{text}]", file=sys.stderr, flush=True)
