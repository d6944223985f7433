"""Smoke tests: does the model answer, stop, not repeat itself, and know what every child knows?

They find what is broken (a template, a mask, a stop token) and do not measure quality. Answers are greedy,
so that a run can be repeated.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import lumi.configs
from lumi.chat import rendering
from lumi.chat.messages import Message, contents
from lumi.config import UserError, load_config
from lumi.host.progress import progress_bar
from lumi.inference.generation import (
    Completion,
    SamplingConfig,
    check_prompts,
    filler_id,
    generate_ids,
    text_ids,
)
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

SHIPPED = Path(lumi.configs.__file__).parent / "evaluation" / "smoke_tests.json"
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    """Which prompts, and how an answer is judged.

    `path`: a JSON file of `SmokeTests`; None: the one that is shipped. `style`: "chat" asks through the
    tokenizer's chat template, "text" lets the model continue a text, "auto" is "chat" if the tokenizer has
    a template. An answer repeats itself if more than `max_repetition` of its runs of `repetition_tokens`
    tokens occurred in it before.
    """

    path: str | None = None
    style: Literal["auto", "chat", "text"] = "auto"
    # The most tokens of an answer.
    max_new_tokens: int = 96
    # Tokens in a run that counts as repeated.
    repetition_tokens: int = 4
    # The largest share of an answer's runs of `repetition_tokens` tokens that may repeat earlier ones.
    max_repetition: float = 0.3

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "repetition_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(f"max_repetition must be between 0 and 1, got {self.max_repetition}")


@dataclass(frozen=True, kw_only=True)
class SmokeMessage:
    """A message of a conversation, in the JSON of the smoke tests."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class SmokePrompt:
    """A question (`prompt`), or a conversation that ends with one (`messages`), and words of a right answer.

    An answer must hold one of `any_of` and each of `all_of`, in upper or lower case. `text`: what a model
    without a chat template continues; None: the question itself.
    """

    prompt: str | None = None
    messages: tuple[SmokeMessage, ...] = ()
    text: str | None = None
    any_of: tuple[str, ...] = ()
    all_of: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if bool(self.prompt) == bool(self.messages):
            raise ValueError("one of prompt and messages must be given, got both or neither")
        if self.messages and self.messages[-1].role != "user":
            raise ValueError(f"messages must end with the user's, got {self.messages[-1].role}")
        if not all(self.any_of + self.all_of) or self.text == "":
            raise ValueError('text and the words of any_of and all_of must not be empty, got ""')

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The messages; a single prompt is one message of the user."""
        if self.prompt:
            return (Message("user", self.prompt),)
        return tuple(Message(message.role, message.content) for message in self.messages)


@dataclass(frozen=True, kw_only=True)
class SmokeTests:
    """Prompts by category."""

    categories: dict[str, tuple[SmokePrompt, ...]]

    def __post_init__(self) -> None:
        if not self.categories or not all(self.categories.values()):
            raise ValueError("categories must hold at least one, each with at least one prompt")


@dataclass(frozen=True, kw_only=True)
class SmokeAnswer:
    """A prompt, its answer, and the outcome of each check that applies."""

    category: str
    prompt: str
    answer: str
    tokens: int
    repetition: float
    checks: dict[str, bool]

    @property
    def passed(self) -> bool:
        """Whether the answer passes all checks."""
        return all(self.checks.values())


@dataclass(frozen=True, kw_only=True)
class SmokeResult:
    """`categories`: for each, how many prompts passed, and how many there are."""

    style: Literal["chat", "text"]
    passed: int
    prompts: int
    categories: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: tuple[SmokeAnswer, ...] = ()


def read_smoke_tests(config: SmokeConfig) -> SmokeTests:
    """The prompts that a config names. Raises UserError if the file does not hold smoke tests."""
    return load_config(SmokeTests, config.path or SHIPPED)


def _encode(prompt: SmokePrompt, tokenizer: Tokenizer, is_chat: bool) -> list[int]:
    if is_chat:
        return rendering.prompt_ids(tokenizer, prompt.conversation)
    return text_ids(tokenizer, _text(prompt))


class EncodedTests(NamedTuple):
    """Smoke tests for one tokenizer: the ids of every prompt in order, and the ids that end an answer."""

    tests: SmokeTests
    is_chat: bool
    prompts: list[list[int]]
    stop_ids: frozenset[int]


def encode_smoke_tests(
    config: SmokeConfig, tests: SmokeTests, tokenizer: Tokenizer, max_positions: int
) -> EncodedTests:
    """Encode every prompt, before any work.

    Args:
        config: decides whether prompts are asked through the chat template.
        tests: the prompts.
        tokenizer: of the model.
        max_positions: of the model.

    Raises:
        UserError: style "chat" without a chat template, a template that refuses a prompt, or a prompt that
            is longer than the model's positions; it names the prompt.
    """
    is_chat = config.style == "chat" or (config.style == "auto" and bool(tokenizer.chat_template))
    encoded = []
    for category, prompts in tests.categories.items():
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids = _encode(prompt, tokenizer, is_chat)
                check_prompts([ids], max_positions)
            except UserError as error:
                raise error.within(f"smoke tests: {category}, prompt {number}") from error
            encoded.append(ids)
    stop_ids = rendering.stop_ids(tokenizer) if is_chat else frozenset(tokenizer.eos_ids)
    return EncodedTests(tests, is_chat, encoded, stop_ids)


def run_smoke_tests(
    config: SmokeConfig, encoded: EncodedTests, model: Transformer, tokenizer: Tokenizer
) -> SmokeResult:
    """Ask every prompt and check the answers.

    Args:
        config: how answers are made and judged.
        encoded: what `encode_smoke_tests` made with the same config and tokenizer.
        model: in evaluation mode.
        tokenizer: of the model.

    Raises:
        UserError: the model's output is not finite.
    """
    categories = encoded.tests.categories
    entries = [(category, prompt) for category, prompts in categories.items() for prompt in prompts]
    answers: list[SmokeAnswer] = []
    with progress_bar("smoke tests", " prompts", total=len(entries)) as progress:
        for start in range(0, len(entries), _BATCH):
            completions = generate_ids(
                model,
                encoded.prompts[start : start + _BATCH],
                SamplingConfig(temperature=0, max_new_tokens=config.max_new_tokens),
                stop_ids=encoded.stop_ids,
                pad_id=filler_id(tokenizer),
                vocab_size=tokenizer.vocab_size,
            )
            asked = entries[start : start + _BATCH]
            for (category, prompt), completion in zip(asked, completions, strict=True):
                answers.append(_judge(config, category, prompt, completion, tokenizer, encoded.is_chat))
            progress.update(len(completions))
    return SmokeResult(
        style="chat" if encoded.is_chat else "text",
        passed=_count_passed(answers),
        prompts=len(answers),
        categories={
            name: (_count_passed(answer for answer in answers if answer.category == name), len(prompts))
            for name, prompts in categories.items()
        },
        answers=tuple(answers),
    )


def _count_passed(answers: Iterable[SmokeAnswer]) -> int:
    return sum(1 for answer in answers if answer.passed)


def _judge(
    config: SmokeConfig,
    category: str,
    prompt: SmokePrompt,
    completion: Completion,
    tokenizer: Tokenizer,
    is_chat: bool,
) -> SmokeAnswer:
    text = tokenizer.decode(completion.ids, continues=True)
    share = repetition(completion.ids, config.repetition_tokens)
    stopped = completion.stopped if is_chat else None
    return SmokeAnswer(
        category=category,
        prompt=contents(prompt.conversation) if is_chat else _text(prompt),
        answer=text,
        tokens=len(completion.ids),
        repetition=share,
        checks=check(prompt, text, stopped, varied=share <= config.max_repetition),
    )


def check(prompt: SmokePrompt, answer: str, stopped: bool | None, varied: bool) -> dict[str, bool]:
    """The outcome of each check that applies. `stopped`: None for a continued text, which has no end."""
    checks = {"not_empty": bool(answer.strip()), "not_repeating": varied}
    if stopped is not None:
        checks["stops"] = stopped
    if prompt.any_of:
        checks["any_of"] = any(_holds(answer, words) for words in prompt.any_of)
    if prompt.all_of:
        checks["all_of"] = all(_holds(answer, words) for words in prompt.all_of)
    return checks


def repetition(ids: Sequence[int], length: int) -> float:
    """The share of the runs of `length` tokens that occur earlier in the same answer; 0 without runs."""
    runs = [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _holds(answer: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer, re.IGNORECASE) is not None


def _text(prompt: SmokePrompt) -> str:
    return prompt.text or contents(prompt.conversation) + "\n"
