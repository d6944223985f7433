"""A conversation -> (token ids, loss mask), both emitted together: no text is searched for an answer.

The renderer walks a template (`lumi/chat/templates.py`) part by part. Control tokens enter as ids, everything
else through `Tokenizer.encode`, which never yields a control id: a user who writes "<|im_end|>" has written
ten characters and ended no turn. Text between two control tokens, such as a header and its message, is
encoded in one piece. An answer is encoded by itself, as the model will generate it. Its tokens, and the one
that ends it, are trained.
"""

from collections.abc import Iterable, Sequence

from lumi.chat import foreign_rendering
from lumi.chat.foreign_rendering import ForeignTemplate
from lumi.chat.foreign_template import TemplateRefusal
from lumi.chat.messages import Message
from lumi.chat.templates import TEMPLATES, Control, Template
from lumi.chat.token_writer import ChatTokenizer, Rendered, TokenWriter
from lumi.config import UserError
from lumi.host.text import utf8


def render_documents(
    tokenizer: ChatTokenizer,
    template: Template | ForeignTemplate,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    num_given: int = 0,
) -> list[Rendered]:
    """A conversation as training documents: one, several (see `foreign_rendering`), or none.

    Arguments and errors as for `render`, and: a template of others refuses or changes the conversation.
    """
    if isinstance(template, ForeignTemplate):
        return foreign_rendering.render(tokenizer, template, messages, max_tokens, num_given)
    rendered = render(tokenizer, template, messages, max_tokens, num_given)
    return [] if rendered is None else [rendered]


def render(
    tokenizer: ChatTokenizer,
    template: Template,
    messages: Sequence[Message],
    max_tokens: int | None = None,
    num_given: int = 0,
) -> Rendered | None:
    """A conversation as a training document in one of Lumi's templates.

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
    if template is None:
        raise UserError(
            "the tokenizer",
            "must have a chat template",
            got="none: the model was not made for conversations",
            remedy="continue a text with `lumi generate --prompt`, or fine-tune the model on conversations",
        )
    if isinstance(template, ForeignTemplate):
        return foreign_rendering.prompt_ids(tokenizer, template, messages)
    _check_reasoning(template, messages)
    writer = _Writer(tokenizer, template)
    writer.begin(messages)
    for message in messages:
        writer.turn(message)
    writer.parts(template.turns["assistant"].before)
    writer.flush()
    return writer.ids


def stop_ids(tokenizer: ChatTokenizer) -> frozenset[int]:
    """The ids that end an answer: those that end a text, and the first control token after an answer in the
    chat template.

    Raises:
        UserError: the tokenizer lacks a control token of its template, or the template fails on a question
            and its answer.
    """
    ids = set(tokenizer.eos_ids)
    template = template_of(tokenizer)
    if isinstance(template, ForeignTemplate):
        ids.update(foreign_rendering.end_of_answer(tokenizer, template))
    elif template is not None:
        ids.add(check_controls(tokenizer, template)[template.end_of_turn])
    return frozenset(ids)


def _check_reasoning(template: Template, messages: Iterable[Message]) -> None:
    if any(message.reasoning for message in messages):
        raise TemplateRefusal(
            f"the template {template.name}",
            foreign_rendering.PLACE_FOR_REASONING,
            got="some, and no place for it",
            remedy="take the field out, or put its text into the content",
        )


def template_of(tokenizer: ChatTokenizer) -> Template | ForeignTemplate | None:
    """The tokenizer's chat template: one of `TEMPLATES` if its Jinja text is that one's. None without one."""
    if not tokenizer.chat_template:
        return None
    same = (template for template in TEMPLATES.values() if template.jinja == tokenizer.chat_template)
    return next(same, ForeignTemplate(tokenizer.chat_template))


def check_controls(tokenizer: ChatTokenizer, template: Template) -> dict[Control, int]:
    """The ids of the control tokens. Raises UserError if the tokenizer lacks one that the template needs.

    Without a BOS token a conversation begins without one.
    """
    known = {
        Control.BOS: tokenizer.bos_id,
        Control.EOS: tokenizer.eos_id,
        Control.IM_START: tokenizer.control_ids.get("<|im_start|>"),
        Control.IM_END: tokenizer.control_ids.get("<|im_end|>"),
    }
    ids = {control: token_id for control, token_id in known.items() if token_id is not None}
    if missing := sorted(control.name for control in template.controls - {Control.BOS} - ids.keys()):
        usable = [other.name for other in TEMPLATES.values() if other.controls - {Control.BOS} <= ids.keys()]
        raise UserError(
            "--template",
            "must need no control token that the tokenizer lacks",
            got=f"{template.name}, which needs {' and '.join(missing)}",
            remedy=f"use {' or '.join(usable) or 'another tokenizer'}",
        )
    return ids


class _Writer(TokenWriter):
    """Writes the turns of one of Lumi's templates."""

    def __init__(self, tokenizer: ChatTokenizer, template: Template):
        super().__init__(tokenizer)
        self.template, self.control_ids = template, check_controls(tokenizer, template)
        self.end_of_answer = 0  # tokens up to the end of the last answer

    def begin(self, messages: Sequence[Message]) -> None:
        """BOS, and the template's default system message if the conversation brings none."""
        if Control.BOS in self.control_ids:
            self.control(self.control_ids[Control.BOS])
        if self.template.default_system is not None and not (messages and messages[0].role == "system"):
            self.turn(Message("system", self.template.default_system))

    def turn(self, message: Message, *, trained: bool = True) -> None:
        """A message and what the template puts around it; `trained` is for an answer."""
        before, after = self.template.turns[message.role]
        self.parts(before)
        if message.role == "assistant":
            self.answer(message.content, trained=trained)
            self.control(self.control_ids[self.template.end_of_turn], trained=trained)
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
