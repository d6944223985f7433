"""Which conversations are fit to learn from: their order of roles, and limits that the config sets."""

from collections import Counter
from dataclasses import dataclass, replace

from lumi.chat.messages import Conversation, Message, contents, find_disorder
from lumi.chat.pairs import Pair
from lumi.corpus.cleaning import CleaningConfig, clean_text
from lumi.corpus.filters import check_languages, check_phrases


@dataclass(frozen=True, kw_only=True)
class ConversationFilterConfig:
    """Limits of a conversation that is kept. Both conversations of a pair must be within them.

    `max_chars` counts all texts together, `max_messages` the system message as well. Every answer has at
    least `min_answer_chars`. `blocked_phrases` are searched in the answers, in upper and lower case.
    Neither of these two judges the rejected answer of a pair, which may be bad.
    `languages` judges the whole conversation.
    """

    max_chars: int = 100_000
    # Messages, with the system message; longer conversations are dropped; null: off.
    max_messages: int | None = None
    # Characters of each answer; a conversation with a shorter one is dropped.
    min_answer_chars: int = 1
    blocked_phrases: tuple[str, ...] = ("as an ai language model",)
    languages: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if self.max_chars < 2:
            raise ValueError(f"max_chars must be at least 2, got {self.max_chars}")
        if self.max_messages is not None and self.max_messages < 2:
            raise ValueError(
                f"max_messages must be at least 2, or null for any number, got {self.max_messages}"
            )
        if self.min_answer_chars < 1:
            raise ValueError(f"min_answer_chars must be at least 1, got {self.min_answer_chars}")
        check_phrases(self.blocked_phrases)
        check_languages(self.languages)


def clean_conversation(
    messages: Conversation, config: CleaningConfig, replaced: Counter[str] | None = None
) -> Conversation:
    """Clean every text. Leave out a blank system message and the last messages without an answer."""
    cleaned = list(_clean(messages, config, replaced))
    while cleaned and cleaned[-1].role == "user":
        cleaned.pop()
    return tuple(cleaned)


def clean_pair(pair: Pair, config: CleaningConfig, replaced: Counter[str] | None = None) -> Pair:
    """Clean every text, as `clean_conversation`; the prompt keeps what the user said last."""
    answers = (clean_conversation(answer, config, replaced) for answer in (pair.chosen, pair.rejected))
    return Pair(_clean(pair.prompt, config, replaced), *answers)


def _clean(messages: Conversation, config: CleaningConfig, replaced: Counter[str] | None) -> Conversation:
    cleaned = (
        message._replace(
            content=clean_text(message.content, config, replaced),
            reasoning=clean_text(message.reasoning, config, replaced),
        )
        for message in messages
    )
    return tuple(message for message in cleaned if message.role != "system" or not _is_blank(message.content))


def find_conversation_fault(messages: Conversation, config: ConversationFilterConfig) -> str:
    """The reason to drop a cleaned conversation, or "" to keep it. `languages` is judged elsewhere, last."""
    disorder = find_disorder(messages)
    if disorder:
        return disorder
    if any(_is_blank(message.content) for message in messages):
        return "empty_turn"
    if config.max_messages is not None and len(messages) > config.max_messages:
        return "too_many_messages"
    answers = [message.content for message in messages if message.role == "assistant"]
    if any(len(answer) < config.min_answer_chars for answer in answers):
        return "short_answer"
    lowered = [contents([message]).lower() for message in messages if message.role == "assistant"]
    if any(phrase.lower() in answer for phrase in config.blocked_phrases for answer in lowered):
        return "blocked_phrase"
    return ""


def find_pair_fault(pair: Pair, config: ConversationFilterConfig) -> str:
    """The reason to drop a cleaned pair, or "" to keep it."""
    if _stripped(pair.chosen) == _stripped(pair.rejected):
        return "equal_answers"
    lenient = replace(config, min_answer_chars=1, blocked_phrases=())
    chosen = find_conversation_fault((*pair.prompt, *pair.chosen), config)
    return chosen or find_conversation_fault((*pair.prompt, *pair.rejected), lenient)


def _stripped(messages: Conversation) -> list[Message]:
    return [Message(role, content.strip(), reasoning.strip()) for role, content, reasoning in messages]


def _is_blank(text: str) -> bool:
    return not text or text.isspace()
