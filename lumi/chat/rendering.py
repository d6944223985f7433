"""A conversation -> (token ids, loss mask), both emitted together: no text is searched for an answer.

The renderer walks a template (`lumi/chat/templates.py`) part by part. Control tokens enter as ids, everything
else through `Tokenizer.encode`, which never yields a control id: a user who writes "<|im_end|>" has written
ten characters and ended no turn. Text between two control tokens, such as a header and its message, is
encoded in one piece. An answer is encoded by itself, as the model will generate it. Its tokens, and the one
that ends it, are trained.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from lumi.chat import foreign_template
from lumi.chat.messages import Message
from lumi.chat.templates import TEMPLATES, Control, Template
from lumi.config import UserError
from lumi.host.text import utf8


class ChatTokenizer(Protocol):
    """What rendering needs of a tokenizer, such as `lumi.tokenizer.tokenizer.Tokenizer`."""

    control_ids: dict[str, int]
    bos_id: int
    eos_id: int
    pad_id: int | None
    im_start_id: int | None
    im_end_id: int | None
    chat_template: str | None

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of plain text, never a control id. `continues`: the text follows other tokens."""
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


def render(
    tokenizer: ChatTokenizer,
    template: Template,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    num_given: int = 0,
) -> Rendered | None:
    """A conversation as a training document.

    Args:
        messages: in any order of roles. What follows the last answer is left out.
        max_tokens: keep whole turns from the start, up to the last answer that ends within so many tokens.
        num_given: answers among so many first messages are not trained.

    Returns:
        None if there is no answer, or none within `max_tokens`.

    Raises:
        UserError: the tokenizer lacks a control token of the template, the template has no place for a
            message's reasoning, or a message holds a lone surrogate.
    """
    _check_reasoning(template, messages)
    writer = _Writer(tokenizer, template)
    size = num_messages = 0
    writer.begin(messages)
    for number, message in enumerate(messages, start=1):
        writer.turn(message, trained=number > num_given)
        if message.role == "assistant":
            if max_tokens is not None and writer.end_of_answer > max_tokens:
                break
            size, num_messages = writer.end_of_answer, number
    return Rendered(writer.ids[:size], writer.mask[:size], num_messages) if size else None


def prompt_ids(tokenizer: ChatTokenizer, messages: Sequence[Message]) -> list[int]:
    """The conversation so far and the header of the next answer, in the tokenizer's chat template.

    With one of Lumi's templates these are exactly the ids before the answer in the training document.
    `foreign_template` renders any other template.

    Raises:
        UserError: the tokenizer has no chat template, or lacks a control token of it; the template refuses or
            changes the conversation, or has no place for a message's reasoning; a message holds a lone
            surrogate.
    """
    for number, message in enumerate(messages, start=1):
        try:
            utf8(message.content)  # here, so that an error counts characters in the message alone
        except UserError as error:
            raise error.within(f"message {number}") from error
    template = template_of(tokenizer)
    _check_reasoning(template, messages)
    writer = _Writer(tokenizer, template)
    if template is not None:
        writer.begin(messages)
        for message in messages:
            writer.turn(message)
        writer.parts(template.turns["assistant"].before)
    else:
        for part in _foreign_parts(tokenizer, messages, add_generation_prompt=True):
            if isinstance(part, foreign_template.ControlPiece):
                writer.control(tokenizer.control_ids[part.piece])
            elif isinstance(part, foreign_template.Content):
                writer.text(messages[part.place].content.strip())
            else:
                writer.text(part)
    writer.flush()
    return writer.ids


def stop_ids(tokenizer: ChatTokenizer) -> frozenset[int]:
    """The ids that end an answer: EOS, and the first control token after an answer in the chat template.

    Raises:
        UserError: the tokenizer lacks a control token of its template, or the template fails on a question
            and its answer.
    """
    ids = {tokenizer.eos_id}
    if (template := template_of(tokenizer)) is not None:
        ids.add(check_controls(tokenizer, template)[template.end_of_turn])
    elif tokenizer.chat_template:
        probe = [Message("user", "a question"), Message("assistant", "an answer")]
        parts = _foreign_parts(tokenizer, probe, add_generation_prompt=False)
        after_answer = parts[parts.index(foreign_template.Content(1)) + 1 :]
        pieces = [part.piece for part in after_answer if isinstance(part, foreign_template.ControlPiece)]
        ids.update(tokenizer.control_ids[piece] for piece in pieces[:1])
    return frozenset(ids)


def loses_reasoning(template: Template | None, messages: Iterable[Message]) -> bool:
    """Whether a message has reasoning that the template has no place for. None: a template of others."""
    return any(message.reasoning for message in messages)  # no template shows it yet


def _check_reasoning(template: Template | None, messages: Iterable[Message]) -> None:
    if loses_reasoning(template, messages):
        name = "the tokenizer's chat template" if template is None else f"the template {template.name}"
        raise UserError(
            "reasoning_content",
            "must be left out of messages",
            got=f"some, and {name} has no place for it",
            remedy="take the field out, or put its text into the content",
        )


def template_of(tokenizer: ChatTokenizer) -> Template | None:
    """The one of `TEMPLATES` whose Jinja text is the tokenizer's chat template, or None."""
    same = (template for template in TEMPLATES.values() if template.jinja == tokenizer.chat_template)
    return next(same, None)


def check_controls(tokenizer: ChatTokenizer, template: Template) -> dict[Control, int]:
    """The ids of the control tokens. Raises UserError if the tokenizer lacks one that the template needs."""
    known = {
        Control.BOS: tokenizer.bos_id,
        Control.EOS: tokenizer.eos_id,
        Control.IM_START: tokenizer.im_start_id,
        Control.IM_END: tokenizer.im_end_id,
    }
    ids = {control: token_id for control, token_id in known.items() if token_id is not None}
    if missing := sorted(control.name for control in template.controls - ids.keys()):
        usable = [other.name for other in TEMPLATES.values() if other.controls <= ids.keys()]
        raise UserError(
            "--template",
            "must need no control token that the tokenizer lacks",
            got=f"{template.name}, which needs {' and '.join(missing)}",
            remedy=f"use {' or '.join(usable) or 'another tokenizer'}",
        )
    return ids


class _Writer:
    """Ids and mask as they grow.

    Text waits until a control token, an answer or `flush`, so that it is encoded in one piece.
    """

    def __init__(self, tokenizer: ChatTokenizer, template: Template | None):
        self.tokenizer, self.template = tokenizer, template
        self.control_ids = check_controls(tokenizer, template) if template is not None else {}
        self.ids: list[int] = []
        self.mask: list[bool] = []
        self.end_of_answer = 0  # tokens up to the end of the last answer
        self._waiting: list[str] = []

    def begin(self, messages: Sequence[Message]) -> None:
        """BOS, and the template's default system message if the conversation brings none."""
        assert self.template is not None
        self.control(self.control_ids[Control.BOS])
        if self.template.default_system is not None and not (messages and messages[0].role == "system"):
            self.turn(Message("system", self.template.default_system))

    def turn(self, message: Message, *, trained: bool = True) -> None:
        """A message and what the template puts around it; `trained` is for an answer."""
        assert self.template is not None
        before, after = self.template.turns[message.role]
        self.parts(before)
        if message.role == "assistant":
            self.flush()
            self._add(self.tokenizer.encode(message.content, continues=True), trained=trained)
            self._add([self.control_ids[self.template.end_of_turn]], trained=trained)
            self.end_of_answer = len(self.ids)
            after = after[1:]
        else:
            self.text(message.content)
        self.parts(after)

    def parts(self, parts: Iterable[str | Control]) -> None:
        """Text and control tokens of the template."""
        for part in parts:
            if isinstance(part, Control):
                self.control(self.control_ids[part])
            else:
                self.text(part)

    def text(self, text: str) -> None:
        """Text that is not trained."""
        self._waiting.append(text)

    def control(self, token_id: int) -> None:
        """A control token that is not trained."""
        self.flush()
        self._add([token_id], trained=False)

    def flush(self) -> None:
        """Encode the waiting text."""
        if text := "".join(self._waiting):
            self._add(self.tokenizer.encode(text, continues=bool(self.ids)), trained=False)
        self._waiting = []

    def _add(self, ids: list[int], *, trained: bool) -> None:
        self.ids += ids
        self.mask += [trained] * len(ids)


def _foreign_parts(
    tokenizer: ChatTokenizer, messages: Sequence[Message], *, add_generation_prompt: bool
) -> tuple[foreign_template.Part, ...]:
    if not tokenizer.chat_template:
        raise UserError(
            "the tokenizer",
            "must have a chat template",
            got="none: the model was not made for conversations",
            remedy="continue a text with `lumi generate --prompt`, or fine-tune the model on conversations",
        )
    spelling = {token_id: piece for piece, token_id in tokenizer.control_ids.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return foreign_template.parts(
        tokenizer.chat_template,
        messages,
        pieces=tuple(tokenizer.control_ids),
        variables=[(name, spelling[token_id]) for name, token_id in ids.items() if token_id is not None],
        add_generation_prompt=add_generation_prompt,
    )
