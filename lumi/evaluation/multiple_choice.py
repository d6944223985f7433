"""Accuracy on a multiple choice task: the choice of the highest log-likelihood is the model's answer."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from lumi.config import UserError
from lumi.evaluation.likelihood import encode_request, score
from lumi.evaluation.records import describe, read_records, tightest
from lumi.evaluation.tasks import TASKS, Question, TaskConfig
from lumi.host.progress import progress_bar
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

DELIMITER = " "  # between a context and a choice


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Shares in [0, 1]. `acc_norm` is scored by log-likelihood per character of the choice, as the harness does.

    `chance` is what guessing gives, `majority` what always giving the most frequent place of the right answer gives. Standard errors
    are those of a mean, sqrt(p (1 - p) / (n - 1)) as in the harness; None for a single example.
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
        limit: at most so many, besides the config's own limit.

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
) -> list[list[float]]:
    """The log-likelihood, in nats, of each choice of each question.

    Args:
        model: in evaluation mode.
        batch_tokens: as in `lumi.evaluation.likelihood.score`.
        name: of the progress line.
    """
    requests, owners = [], []
    for number, question in enumerate(questions):
        if len(set(question.contexts)) == 1:
            requests.append(
                encode_request(
                    tokenizer, question.contexts[0], [DELIMITER + choice for choice in question.choices]
                )
            )
            owners.append(number)
        else:
            for context, choice in zip(question.contexts, question.choices, strict=True):
                requests.append(encode_request(tokenizer, context, [DELIMITER + choice]))
                owners.append(number)
    scores: list[list[float]] = [[] for _ in questions]
    with progress_bar(
        name, " choices", total=sum(len(question.choices) for question in questions)
    ) as progress:
        found = score(model, requests, batch_tokens=batch_tokens, on_done=progress.update)
    for owner, some in zip(owners, found, strict=True):
        scores[owner] += some
    return scores


def accuracy(
    questions: Sequence[Question], scores: Sequence[Sequence[float]], normalised: bool
) -> TaskResult:
    """Count the right answers; of equal scores the first choice counts."""
    if not questions:
        raise UserError("a task must have at least one question, got none")
    right, right_norm = 0, 0
    for question, plain in zip(questions, scores, strict=True):
        per_character = [
            value / max(len(text), 1) for value, text in zip(plain, question.choices, strict=True)
        ]
        right += _largest(plain) == question.answer
        right_norm += _largest(per_character) == question.answer
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
    """Of a share of `number` examples: sqrt(p (1 - p) / (n - 1)); None for one example, which says nothing of the spread."""
    return math.sqrt(share * (1 - share) / (number - 1)) if number > 1 else None


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
