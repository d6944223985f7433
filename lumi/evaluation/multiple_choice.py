"""Accuracy on a multiple choice task: the model's answer is the choice with the highest log-likelihood."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from lumi.config import UserError
from lumi.corpus.sources import describe
from lumi.evaluation.likelihood import encode_request, score
from lumi.evaluation.records import read_records, tightest
from lumi.evaluation.tasks import TASKS, Question, TaskConfig
from lumi.host.progress import progress_bar
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

DELIMITER = " "  # between a context and a choice


class QuestionScores(NamedTuple):
    """Log-likelihoods, in nats, of each choice of each question, and how many questions were cut to fit."""

    nats: list[list[float]]
    num_cut: int


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Shares in [0, 1]. `acc_norm` is scored by log-likelihood per character of the choice, like the harness.

    `chance` is the accuracy of guessing, `majority` that of always giving the place where the right answer
    stands most often. Standard errors are those of a mean, sqrt(p (1 - p) / (n - 1)) as in the harness;
    None for a single example.
    """

    acc: float
    acc_stderr: float | None
    acc_norm: float | None
    acc_norm_stderr: float | None
    chance: float
    majority: float
    examples: int


def read_questions(config: TaskConfig, limit: int | None = None) -> list[Question]:
    """The questions of a task.

    Args:
        config: the task.
        limit: how many at most, besides the config's own limit.

    Raises:
        UserError: the records cannot be read, or one holds no question of this kind (names it).
    """
    records = read_records(config.source, tightest(config.limit, limit))
    place = f"task {config.name!r}: {describe(config.source)}"
    return [
        TASKS[config.kind].ask(record, f"{place}, record {number}")
        for number, record in enumerate(records, start=1)
    ]


def score_questions(
    questions: Sequence[Question],
    model: Transformer,
    tokenizer: Tokenizer,
    batch_tokens: int,
    name: str = "task",
) -> QuestionScores:
    """Score each choice of each question.

    Args:
        model: in evaluation mode.
        batch_tokens: as in `lumi.evaluation.likelihood.score`.
        name: of the progress line.
    """
    requests, owners = [], []
    for number, question in enumerate(questions):
        choices = [DELIMITER + choice for choice in question.choices]
        if len(set(question.contexts)) == 1:
            asked = [encode_request(tokenizer, question.contexts[0], choices)]
        else:
            pairs = zip(question.contexts, choices, strict=True)
            asked = [encode_request(tokenizer, context, [choice]) for context, choice in pairs]
        requests += asked
        owners += [number] * len(asked)
    nats: list[list[float]] = [[] for _ in questions]
    num_choices = sum(len(question.choices) for question in questions)
    with progress_bar(name, " choices", total=num_choices) as progress:
        found = score(model, requests, batch_tokens=batch_tokens, on_done=progress.update)
    for owner, some in zip(owners, found, strict=True):
        nats[owner] += some
    max_positions = model.config.max_positions
    cut = {owner for owner, request in zip(owners, requests, strict=True) if request.is_cut(max_positions)}
    return QuestionScores(nats, len(cut))


def accuracy(
    questions: Sequence[Question], scores: Sequence[Sequence[float]], normalised: bool
) -> TaskResult:
    """Count the right answers; of equal scores the first choice counts."""
    if not questions:
        raise UserError("a task", "must have at least one question", got="none")
    right, right_norm = 0, 0
    for question, plain in zip(questions, scores, strict=True):
        lengths = [max(len(choice), 1) for choice in question.choices]
        per_character = [value / length for value, length in zip(plain, lengths, strict=True)]
        if _largest(plain) == question.answer:
            right += 1
        if _largest(per_character) == question.answer:
            right_norm += 1
    number = len(questions)
    return TaskResult(
        acc=right / number,
        acc_stderr=standard_error(right / number, number),
        acc_norm=right_norm / number if normalised else None,
        acc_norm_stderr=standard_error(right_norm / number, number) if normalised else None,
        chance=sum(1 / len(question.choices) for question in questions) / number,
        majority=Counter(question.answer for question in questions).most_common(1)[0][1] / number,
        examples=number,
    )


def standard_error(share: float, number: int) -> float | None:
    """sqrt(p (1 - p) / (n - 1)) for a share of `number` examples; None for one, which shows no spread."""
    return math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else None


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
