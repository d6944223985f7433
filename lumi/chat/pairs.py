"""A pair: two continuations of one conversation, of which somebody prefers one."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from lumi.chat.foreign_rendering import ForeignTemplate
from lumi.chat.messages import Conversation, Message, from_json, to_json
from lumi.chat.rendering import render_documents
from lumi.chat.templates import Template
from lumi.chat.token_writer import ChatTokenizer, Rendered


class Pair(NamedTuple):
    """A conversation up to a question, and two ways in which it goes on; each begins with an answer."""

    prompt: Conversation
    chosen: Conversation
    rejected: Conversation

    @property
    def messages(self) -> Conversation:
        """All messages: the prompt's, the chosen ones, the rejected ones."""
        return (*self.prompt, *self.chosen, *self.rejected)


def split_pair(chosen: Sequence[Message], rejected: Sequence[Message]) -> Pair:
    """The pair of two whole conversations: what they have in common at their beginning is the prompt."""
    same = 0
    while same < min(len(chosen), len(rejected)) and chosen[same] == rejected[same]:
        same += 1
    return Pair(tuple(chosen[:same]), tuple(chosen[same:]), tuple(rejected[same:]))


def pair_to_json(pair: Pair) -> dict[str, Any]:
    """The plain JSON values of a pair."""
    return {name: to_json(messages) for name, messages in zip(pair._fields, pair, strict=True)}


def pair_from_json(data: dict[str, Any]) -> Pair:
    """The pair that `pair_to_json` was given; it checks nothing."""
    return Pair(*(from_json(data[name]) for name in Pair._fields))


def render_pair(
    tokenizer: ChatTokenizer,
    template: Template | ForeignTemplate,
    pair: Pair,
    max_tokens: int | None = None,
) -> tuple[Rendered, Rendered] | None:
    """The chosen and the rejected conversation, whole, as training documents. The prompt is not trained.

    Returns:
        None if one of them is longer than `max_tokens`, or the template shows it as several documents.

    Raises:
        UserError: as `render_documents`.
    """
    sides = []
    for answer in (pair.chosen, pair.rejected):
        messages = (*pair.prompt, *answer)
        documents = render_documents(tokenizer, template, messages, max_tokens, num_given=len(pair.prompt))
        if len(documents) != 1 or documents[0].num_messages < len(messages):
            return None
        sides += documents
    return sides[0], sides[1]
