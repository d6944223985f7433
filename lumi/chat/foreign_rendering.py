"""A conversation in the chat template of somebody else's model -> ids and loss mask.

The template says what is trained, by what it renders; no text is searched for an answer:

- Where it marks answers by {% generation %}, what stands between the marks.
- Else it renders the conversation up to each answer twice: with the header that asks for the answer, and with
  the answer. What the second has more is what a model has to generate, to the first control token.

Some templates show an answer in another way once the conversation goes on: those of reasoning models leave
out what was thought. Each answer is trained as it is when it is given, so such a conversation becomes several
documents, which end at one answer after the other.

Text between two control tokens is encoded in one piece, as transformers does. A token is trained if a part of
it is.
"""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lumi.chat import foreign_template
from lumi.chat.foreign_template import Content, ControlPiece, Mark, Part, TemplateRefusal
from lumi.chat.messages import Message
from lumi.chat.token_writer import ChatTokenizer, Rendered, TokenWriter

PLACE_FOR_REASONING = "must have a place for reasoning_content"


@dataclass(frozen=True)
class ForeignTemplate:
    """Jinja text in the dialect of transformers' chat templates."""

    jinja: str

    @property
    def name(self) -> str:
        """In manifests."""
        return f"model-{hashlib.sha256(self.jinja.encode()).hexdigest()[:16]}"


class _Unit(NamedTuple):
    """A character, a control piece or a content, and whether it is trained."""

    part: str | ControlPiece | Content
    trained: bool


def render(
    tokenizer: ChatTokenizer,
    template: ForeignTemplate,
    messages: Sequence[Message],
    max_tokens: int | None,
    num_given: int,
) -> list[Rendered]:
    """As `lumi.chat.rendering.render_documents`."""
    roles = enumerate((message.role for message in messages), start=1)
    answers = [number for number, role in roles if role == "assistant" and number > num_given]
    if not answers:
        return []
    messages = _with_reasoning_apart(template, messages[: answers[-1]])
    whole = _parts(tokenizer, template, messages)
    if any(isinstance(part, Mark) for part in whole):
        for number in answers:
            _check_reasoning(whole, messages, number)
        units = _units(whole)
        places = (place for place, unit in enumerate(units) if unit.part == Content(num_given - 1))
        given = next(places, -1) + 1
        documents = [[*(unit._replace(trained=False) for unit in units[:given]), *units[given:]]]
    else:
        documents = _derived(tokenizer, template, messages, answers)
    rendered = (_encode(tokenizer, document, messages, max_tokens) for document in documents)
    return [document for document in rendered if document is not None]


def prompt_ids(tokenizer: ChatTokenizer, template: ForeignTemplate, messages: Sequence[Message]) -> list[int]:
    """As `lumi.chat.rendering.prompt_ids`."""
    writer, messages = TokenWriter(tokenizer), _with_reasoning_apart(template, messages)
    parts = _parts(tokenizer, template, messages, asks=True)
    _write(writer, [_Unit(unit.part, False) for unit in _units(parts)], messages)
    return writer.ids


def end_of_answer(tokenizer: ChatTokenizer, template: ForeignTemplate) -> list[int]:
    """The id of the first control token after an answer, if there is one."""
    probe = [Message("user", "a question"), Message("assistant", "an answer")]
    parts = _parts(tokenizer, template, probe)
    after = parts[parts.index(Content(1)) + 1 :]
    return [tokenizer.control_ids[part.piece] for part in after if isinstance(part, ControlPiece)][:1]


def _parts(
    tokenizer: ChatTokenizer, template: ForeignTemplate, messages: Sequence[Message], asks: bool = False
) -> tuple[Part, ...]:
    spelling = {token_id: piece for piece, token_id in tokenizer.control_ids.items()}
    ids = {"bos_token": tokenizer.bos_id, "eos_token": tokenizer.eos_id, "pad_token": tokenizer.pad_id}
    return foreign_template.parts(
        template.jinja,
        messages,
        pieces=tuple(tokenizer.control_ids),
        variables=[(name, spelling[token_id]) for name, token_id in ids.items() if token_id in spelling],
        add_generation_prompt=asks,
    )


def _with_reasoning_apart(template: ForeignTemplate, messages: Sequence[Message]) -> Sequence[Message]:
    """What a model wrote before </think> as its reasoning, for templates that show it apart. They would cut
    it off the content themselves, but they see no content."""
    if "reasoning_content" not in template.jinja:
        return messages
    apart = []
    for message in messages:
        if message.role == "assistant" and "</think>" in message.content and not message.reasoning:
            thought, _, content = message.content.partition("</think>")
            message = message._replace(
                reasoning=thought.removeprefix("<think>"), content=content.lstrip("\n")
            )
        apart.append(message)
    return apart


def _check_reasoning(parts: Sequence[Part], messages: Sequence[Message], number: int) -> None:
    if messages[number - 1].reasoning and Content(number - 1, True) not in parts:
        remedy = "take it out of the conversation, or choose another --template"
        got = f"none for that of message {number}"
        raise TemplateRefusal(foreign_template.SUBJECT, PLACE_FOR_REASONING, got=got, remedy=remedy)


def _units(parts: Iterable[Part]) -> list[_Unit]:
    units, trained = [], False
    for part in parts:
        if isinstance(part, Mark):
            trained = part is Mark.BEGIN
        elif isinstance(part, str):
            units += [_Unit(character, trained) for character in part]
        else:
            units.append(_Unit(part, trained))
    return units


def _derived(
    tokenizer: ChatTokenizer, template: ForeignTemplate, messages: Sequence[Message], answers: Sequence[int]
) -> list[list[_Unit]]:
    """Documents with every answer trained once, by the renderings up to each of `answers` (from 1)."""
    documents: list[list[_Unit]] = []
    for number in answers:
        asked = _units(_parts(tokenizer, template, messages[: number - 1], asks=True))
        parts = _parts(tokenizer, template, messages[:number])
        _check_reasoning(parts, messages, number)
        answered = _units(parts)
        content = next(place for place, unit in enumerate(answered) if unit.part == Content(number - 1))
        if answered[: len(asked)] != asked or content < len(asked):
            raise TemplateRefusal(
                foreign_template.SUBJECT,
                "must render a conversation up to an answer as the beginning of the conversation with it, "
                "or mark answers by {% generation %}",
                got=f"another beginning for the answer of message {number}",
                remedy="choose another --template of `lumi tokenize`, or replace chat_template.jinja",
            )
        rest = range(content, len(answered))
        ends = (place for place in rest if isinstance(answered[place].part, ControlPiece))
        end = next(ends, len(answered) - 1) + 1
        document = [*asked, *(_Unit(unit.part, True) for unit in answered[len(asked) : end])]
        if documents and _same_parts(documents[-1], document[: len(documents[-1])]):
            documents[-1] += document[len(documents[-1]) :]
        else:
            documents.append(document)
    return documents


def _same_parts(first: Sequence[_Unit], second: Sequence[_Unit]) -> bool:
    return [unit.part for unit in first] == [unit.part for unit in second]


def _write(writer: TokenWriter, units: Iterable[_Unit], messages: Sequence[Message]) -> None:
    for part, trained in units:
        if isinstance(part, ControlPiece):
            writer.control(writer.tokenizer.control_ids[part.piece], trained=trained)
        elif isinstance(part, Content):
            message = messages[part.place]
            text = message.reasoning if part.is_reasoning else message.content
            writer.text(text.strip(), trained=trained)
        else:
            writer.text(part, trained=trained)
    writer.flush()


def _encode(
    tokenizer: ChatTokenizer, units: Sequence[_Unit], messages: Sequence[Message], max_tokens: int | None
) -> Rendered | None:
    """The document up to its last answer that ends within `max_tokens`; None if there is none."""
    writer = TokenWriter(tokenizer)
    _write(writer, units, messages)
    contents = (unit.part for unit in units if unit.trained and isinstance(unit.part, Content))
    answers = [content.place + 1 for content in contents if not content.is_reasoning]
    # Where each run of trained tokens ends.
    ends = [
        end
        for end, trained in enumerate(writer.mask, start=1)
        if trained and not any(writer.mask[end : end + 1])
    ]
    if len(ends) != len(answers):  # such a template cannot be cut between answers
        ends, answers = ends[-1:], answers[-1:]
    kept = [end for end in ends if max_tokens is None or end <= max_tokens]
    if not kept:
        return None
    return Rendered(writer.ids[: kept[-1]], writer.mask[: kept[-1]], answers[len(kept) - 1])
