"""Preference data: a question and two answers, of which somebody prefers one."""

from dataclasses import dataclass
from typing import Any, Literal

from lumi.chat.messages import Conversation, MalformedConversation, Message, parse_messages
from lumi.chat.pairs import Pair, split_pair
from lumi.corpus.conversations import (
    SHAREGPT_FIELDS,
    Format,
    check_names,
    read_field,
    read_history,
    rename,
    unused_in_messages,
    with_system,
)


@dataclass(frozen=True, kw_only=True)
class PreferenceFormat(Format):
    """A prompt and two answers in fields of their own.

    Each is a text, a message or a list of messages, of {"role", "content"} or {"from", "value"}. Where both
    answers begin before an answer, they are whole conversations: the prompt is their common beginning.
    `history` is read as in "alpaca", and belongs to the prompt.
    """

    kind: Literal["preference"] = "preference"
    # The field with the prompt; a record may lack it where its answers are whole conversations.
    prompt_field: str = "prompt"
    # The field with the answer that is preferred.
    chosen_field: str = "chosen"
    # The field with the other answer.
    rejected_field: str = "rejected"
    # The field with the system message; null: `system`, where a record has it.
    system_field: str | None = None

    def __post_init__(self) -> None:
        check_names(
            prompt_field=self.prompt_field,
            chosen_field=self.chosen_field,
            rejected_field=self.rejected_field,
            system_field=self.system_field,
        )

    @property
    def required(self) -> tuple[str, ...]:
        return self.chosen_field, self.rejected_field

    @property
    def optional(self) -> tuple[str, ...]:
        fields = (*self.required, self.prompt_field)
        names = ("history", self.system_field or "system")
        before = (name for name in names if name not in fields)
        return (self.prompt_field, *before, *super().optional)

    def unused(self, record: dict[str, Any]) -> list[str]:
        fields = (self.prompt_field, *self.required)
        return [*super().unused(record), *unused_in_messages(record, fields, SHAREGPT_FIELDS)]

    def parse(self, record: dict[str, Any]) -> Pair:
        chosen, rejected = (_read_messages(record, name, "assistant") for name in self.required)
        prompt: Conversation = ()
        if record.get(self.prompt_field) is not None:
            prompt = _read_messages(record, self.prompt_field, "user")
        if chosen == rejected:
            raise MalformedConversation("equal_answers", "")
        if chosen[0].role != "assistant" and rejected[0].role != "assistant":
            pair = split_pair(chosen, rejected)
            if pair.prompt[len(pair.prompt) - len(prompt) :] != prompt:
                raise MalformedConversation("different_prompts", "the prompt is not what both begin with")
        else:
            if not prompt:
                read_field(record, self.prompt_field)
            pair = Pair(prompt, chosen, rejected)
        if not all(answer and answer[0].role == "assistant" for answer in (pair.chosen, pair.rejected)):
            raise MalformedConversation("different_prompts", "the two differ before an answer begins")
        # The prompt itself may stand in "history" or "system".
        before = {name: record.get(name) for name in self.optional if name != self.prompt_field}
        prompt = (*read_history(before), *pair.prompt)
        return pair._replace(prompt=with_system(before, prompt, self.system_field or "system"))


def _read_messages(record: dict[str, Any], name: str, role: Literal["user", "assistant"]) -> Conversation:
    """The messages in a field; a text is one of `role`."""
    value = read_field(record, name)
    if isinstance(value, str):
        return (Message(role, value),)
    if not isinstance(value, list | dict):
        expectation = "must be a text, a message or a list of messages"
        raise MalformedConversation("wrong_type", f"{name!r} {expectation}, got {type(value).__name__}")
    return parse_messages([rename(message) for message in (value if isinstance(value, list) else [value])])
