"""Smoke tests: does the model answer, stop, not repeat itself, and know what every child knows? Greedy, so that a run can be repeated.

They find what is broken, a template or a mask or a stop token, and are no measure of quality.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import lumi.configs
from lumi.chat import rendering as chat
from lumi.chat.messages import Message
from lumi.config import UserError, load_config
from lumi.host.progress import progress_bar
from lumi.inference.generation import SamplingConfig, check_prompts, filler_id, generate_ids, text_ids
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

SHIPPED = Path(lumi.configs.__file__).parent / "evaluation" / "smoke_tests.json"
_BATCH = 16


@dataclass(frozen=True, kw_only=True)
class SmokeConfig:
    """Which prompts, and how an answer is judged.

    `path`: a JSON file of `SmokeTests`; None: the one that is shipped. `style` "chat" asks through the tokenizer's chat template, "text"
    lets the model go on with a text; "auto" is "chat" where the tokenizer has a template. `max_repetition`: the largest share of runs of
    `repetition_tokens` tokens that may have been there before.
    """

    path: str | None = None
    style: Literal["auto", "chat", "text"] = "auto"
    max_new_tokens: int = 96
    repetition_tokens: int = 4
    max_repetition: float = 0.3

    def __post_init__(self) -> None:
        for name in ("max_new_tokens", "repetition_tokens"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if not 0 <= self.max_repetition <= 1:
            raise ValueError(f"max_repetition must be between 0 and 1, got {self.max_repetition}")


@dataclass(frozen=True, kw_only=True)
class Turn:
    """A message of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True)
class SmokePrompt:
    """A question, or the conversation up to one, and words that a right answer holds (upper and lower case are the same).

    `text` is what a model without a chat template is given to go on with; None: the question itself.
    """

    prompt: str | None = None
    messages: tuple[Turn, ...] = ()
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
        """The messages, of which a single prompt is the user's."""
        return tuple(Message(turn.role, turn.content) for turn in self.messages) or (
            Message("user", self.prompt or ""),
        )


@dataclass(frozen=True, kw_only=True)
class SmokeTests:
    """Prompts by category."""

    categories: dict[str, tuple[SmokePrompt, ...]]

    def __post_init__(self) -> None:
        if not self.categories or not all(self.categories.values()):
            raise ValueError("categories must hold at least one, each with at least one prompt")


@dataclass(frozen=True, kw_only=True)
class SmokeAnswer:
    """What was asked and answered, and each check that applies with its outcome."""

    category: str
    prompt: str
    answer: str
    tokens: int
    repetition: float
    checks: dict[str, bool]

    @property
    def passed(self) -> bool:
        """Whether all checks are met."""
        return all(self.checks.values())


@dataclass(frozen=True, kw_only=True)
class SmokeResult:
    """`categories`: how many prompts of each passed, and how many there are."""

    style: Literal["chat", "text"]
    passed: int
    prompts: int
    categories: dict[str, tuple[int, int]] = field(default_factory=dict)
    answers: tuple[SmokeAnswer, ...] = ()


def read_smoke_tests(config: SmokeConfig) -> SmokeTests:
    """The prompts that a config names. Raises UserError where the file is not one of smoke tests."""
    return load_config(SmokeTests, config.path or SHIPPED)


class EncodedTests(NamedTuple):
    """Smoke tests as a model is given them: the token ids of every prompt, category by category, and what ends an answer."""

    tests: SmokeTests
    is_chat: bool
    prompts: list[list[int]]
    stop_ids: frozenset[int]


def encode_smoke_tests(
    config: SmokeConfig, tests: SmokeTests, tokenizer: Tokenizer, max_positions: int
) -> EncodedTests:
    """Encode every prompt, before any work.

    Args:
        tokenizer: of the model; its chat template asks.
        max_positions: the model's.

    Raises:
        UserError: style "chat" without a chat template, one that refuses a prompt (names it), a prompt longer than the model's positions.
    """
    is_chat = config.style == "chat" or (config.style == "auto" and bool(tokenizer.chat_template))
    encoded = []
    for category, prompts in tests.categories.items():
        for number, prompt in enumerate(prompts, start=1):
            try:
                ids = (
                    chat.prompt_ids(tokenizer, prompt.conversation)
                    if is_chat
                    else text_ids(tokenizer, _text(prompt))
                )
                check_prompts([ids], max_positions)
            except UserError as error:
                raise UserError(f"smoke tests: {category}, prompt {number}: {error}") from error
            encoded.append(ids)
    return EncodedTests(
        tests, is_chat, encoded, chat.stop_ids(tokenizer) if is_chat else frozenset({tokenizer.eos_id})
    )


def run_smoke_tests(
    config: SmokeConfig, encoded: EncodedTests, model: Transformer, tokenizer: Tokenizer
) -> SmokeResult:
    """Ask every prompt and check the answers.

    Args:
        encoded: what `encode_smoke_tests` made with the same config and tokenizer.
        model: in evaluation mode.

    Raises:
        UserError: the model's output is not finite.
    """
    tests, is_chat, asked, stop_ids = encoded
    entries = [(category, prompt) for category, prompts in tests.categories.items() for prompt in prompts]
    answers: list[SmokeAnswer] = []
    with progress_bar("smoke tests", " prompts", total=len(entries)) as progress:
        for start in range(0, len(entries), _BATCH):
            completions = generate_ids(
                model,
                asked[start : start + _BATCH],
                SamplingConfig(temperature=0, max_new_tokens=config.max_new_tokens),
                stop_ids=stop_ids,
                pad_id=filler_id(tokenizer),
                vocab_size=tokenizer.vocab_size,
            )
            for (category, prompt), completion in zip(
                entries[start : start + _BATCH], completions, strict=True
            ):
                text = tokenizer.decode(completion.ids, continues=True)
                share = repetition(completion.ids, config.repetition_tokens)
                stopped = completion.stopped if is_chat else None
                answers.append(
                    SmokeAnswer(
                        category=category,
                        prompt="\n".join(message.content for message in prompt.conversation)
                        if is_chat
                        else _text(prompt),
                        answer=text,
                        tokens=len(completion.ids),
                        repetition=share,
                        checks=check(prompt, text, stopped, share <= config.max_repetition),
                    )
                )
            progress.update(len(completions))
    categories = {
        name: (sum(answer.passed for answer in answers if answer.category == name), len(prompts))
        for name, prompts in tests.categories.items()
    }
    return SmokeResult(
        style="chat" if is_chat else "text",
        passed=sum(answer.passed for answer in answers),
        prompts=len(answers),
        categories=categories,
        answers=tuple(answers),
    )


def check(prompt: SmokePrompt, answer: str, stopped: bool | None, varied: bool) -> dict[str, bool]:
    """The checks that apply. `stopped` is None for a text that goes on: it has no end that could be asked for."""
    checks = {"not_empty": bool(answer.strip()), "not_repeating": varied}
    if stopped is not None:
        checks["stops"] = stopped
    if prompt.any_of:
        checks["any_of"] = any(_holds(answer, words) for words in prompt.any_of)
    if prompt.all_of:
        checks["all_of"] = all(_holds(answer, words) for words in prompt.all_of)
    return checks


def repetition(ids: Sequence[int], length: int) -> float:
    """The share of the runs of `length` tokens that came before in the same answer; 0 where there are none."""
    runs = [tuple(ids[start : start + length]) for start in range(len(ids) - length + 1)]
    return 1 - len(set(runs)) / len(runs) if runs else 0.0


def _holds(answer: str, words: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(words)}(?!\w)", answer, re.IGNORECASE) is not None


def _text(prompt: SmokePrompt) -> str:
    return prompt.text or "\n".join(message.content for message in prompt.conversation) + "\n"
