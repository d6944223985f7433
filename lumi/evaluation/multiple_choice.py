"""How a task is measured: by bits per byte of the right answer, its margin over the others, and accuracy.

A small model's accuracy stays near chance long after its likelihoods tell models apart. So the likelihoods
come first. Bits are -log2 of a choice's likelihood, and bytes those of the choice in UTF-8, as in the
harness's `acc_bytes`: the space before it is predicted and not counted.

The margin is the mean bits per byte of the wrong choices minus those of the right one. A model that cannot
tell them apart gets 0 on average, however many choices there are. Over the best wrong choice alone it would
get less, the more choices there are.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lumi.config import UserError
from lumi.corpus.raw_records import read_records
from lumi.corpus.sources import describe
from lumi.evaluation import few_shot
from lumi.evaluation.likelihood import Scored, encode_request, score
from lumi.evaluation.records import tightest
from lumi.evaluation.tasks import TASKS, Question, Task, TaskConfig
from lumi.host.progress import progress_bar
from lumi.model.transformer import Transformer
from lumi.tokenizer.tokenizer import Tokenizer

DELIMITER = " "  # between a context and a choice


class QuestionScores(NamedTuple):
    """How likely each choice of each question is, and how many questions were cut to fit."""

    scored: list[list[Scored]]
    num_cut: int


class Outcome(NamedTuple):
    """What the model made of one question.

    Attributes:
        nats: log-likelihood of each choice.
        bits_per_byte: of the right choice.
        margin: in bits per byte; None: there is one choice.
        right: the right choice has the highest log-likelihood (of equal ones the first counts), or greedy
            decoding gives the only choice.
        right_norm: the same by log-likelihood per character of the choice; None: the task has no acc_norm.
    """

    nats: tuple[float, ...]
    bits_per_byte: float
    margin: float | None
    right: bool
    right_norm: bool | None


class Mean(NamedTuple):
    """Of the examples of a task. `stderr`: stdev / sqrt(n), as in the harness; None: a single example."""

    value: float
    stderr: float | None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """Means over a task. `bits_per_byte` and `margin` are those of `Outcome`, accuracies are in [0, 1].

    `perplexity` is that of the answer as a whole, where there is one choice; its standard error is that of
    the mean log-likelihood times the perplexity. `chance` is the accuracy of guessing, `majority` that of
    always giving the place where the right answer stands most often; None: that place says nothing.
    """

    bits_per_byte: Mean
    margin: Mean | None
    acc: Mean
    acc_norm: Mean | None
    perplexity: Mean | None
    chance: float
    majority: float | None
    examples: int

    def to_plain(self) -> dict[str, Any]:
        """As it is written: a mean `name` becomes `name` and `name_stderr`."""
        plain: dict[str, Any] = {}
        for name in ("bits_per_byte", "margin", "perplexity", "acc", "acc_norm"):
            plain[name], plain[f"{name}_stderr"] = getattr(self, name) or (None, None)
        return plain | {"chance": self.chance, "majority": self.majority, "examples": self.examples}


def read_questions(config: TaskConfig, limit: int | None = None) -> list[Question]:
    """The questions of a task, each behind its solved examples.

    Args:
        config: the task.
        limit: how many at most, besides the config's own limit.

    Raises:
        UserError: the records cannot be read, one holds no question of this kind (names it), or there are
            too few examples.
    """
    task, name = TASKS[config.kind], f"task {config.name!r}"
    records = read_records(config.source, tightest(config.limit, limit))
    place = f"{name}: {describe(config.source)}"
    questions = [task.ask(record, f"{place}, record {number}") for number, record in enumerate(records, 1)]
    if config.few_shot is None:
        return questions
    source = config.few_shot.source
    pool = read_records(source)
    leave_out_itself = source == config.source or not task.has_test_split
    try:
        drawn = few_shot.draw(config.few_shot, pool, records, leave_out_itself)
    except UserError as error:
        raise error.within(name) from error
    place = f"{name}: {describe(source)}"
    solved = {
        number: _solved(task, task.ask(pool[number], f"{place}, record {number + 1}"))
        for number in sorted(set().union(*drawn))
    }
    return [
        _behind("".join(solved[number] for number in chosen), question)
        for chosen, question in zip(drawn, questions, strict=True)
    ]


def _solved(task: Task, question: Question) -> str:
    context, choice = question.contexts[question.answer], question.choices[question.answer]
    return f"{context}{task.solution_delimiter}{choice}{few_shot.DELIMITER}"


def _behind(examples: str, question: Question) -> Question:
    return question._replace(contexts=tuple(examples + context for context in question.contexts))


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
    scored: list[list[Scored]] = [[] for _ in questions]
    num_choices = sum(len(question.choices) for question in questions)
    with progress_bar(name, " choices", total=num_choices) as progress:
        found = score(model, requests, batch_tokens=batch_tokens, on_done=progress.update)
    for owner, some in zip(owners, found, strict=True):
        scored[owner] += some
    max_positions = model.config.max_positions
    cut = {owner for owner, request in zip(owners, requests, strict=True) if request.is_cut(max_positions)}
    return QuestionScores(scored, len(cut))


def outcomes(
    questions: Sequence[Question], scored: Sequence[Sequence[Scored]], normalised: bool
) -> list[Outcome]:
    """Judge what `score_questions` found; `normalised`: the task has an acc_norm."""
    return [
        _outcome(question, choices, normalised) for question, choices in zip(questions, scored, strict=True)
    ]


def _outcome(question: Question, scored: Sequence[Scored], normalised: bool) -> Outcome:
    nats, answer = tuple(choice.nats for choice in scored), question.answer
    per_byte = _per(nats, (len(choice.encode()) for choice in question.choices))
    per_character = _per(nats, map(len, question.choices))
    bits = [-value / math.log(2) for value in per_byte]
    wrong = [value for place, value in enumerate(bits) if place != answer]
    return Outcome(
        nats=nats,
        bits_per_byte=bits[answer],
        margin=math.fsum(wrong) / len(wrong) - bits[answer] if wrong else None,
        right=_largest(nats) == answer if wrong else scored[answer].is_greedy,
        right_norm=_largest(per_character) == answer if normalised else None,
    )


def result_of(task: Task, questions: Sequence[Question], found: Sequence[Outcome]) -> TaskResult:
    """The means of a task."""
    if not questions:
        raise UserError("a task", "must have at least one question", got="none")
    number = len(questions)
    places = Counter(question.answer for question in questions)
    is_completion = all(len(question.choices) == 1 for question in questions)
    margins = [outcome.margin for outcome in found if outcome.margin is not None]
    normalised = [outcome.right_norm for outcome in found if outcome.right_norm is not None]
    return TaskResult(
        bits_per_byte=mean([outcome.bits_per_byte for outcome in found]),
        margin=mean(margins) if margins else None,
        acc=mean([outcome.right for outcome in found]),
        acc_norm=mean(normalised) if normalised else None,
        perplexity=_perplexity([outcome.nats[0] for outcome in found]) if is_completion else None,
        chance=0.0 if is_completion else sum(1 / len(question.choices) for question in questions) / number,
        majority=places.most_common(1)[0][1] / number if task.is_shuffled else None,
        examples=number,
    )


def mean(values: Sequence[float]) -> Mean:
    """The mean of at least one value, with its standard error."""
    number = len(values)
    value = math.fsum(values) / number
    if number == 1:
        return Mean(value, None)
    return Mean(value, math.sqrt(math.fsum((each - value) ** 2 for each in values) / (number - 1) / number))


def _perplexity(nats: Sequence[float]) -> Mean | None:
    """None: it is no float."""
    value, stderr = mean(nats)
    if value < -700:
        return None
    return Mean(math.exp(-value), None if stderr is None else stderr * math.exp(-value))


def _per(nats: Sequence[float], lengths: Iterable[int]) -> list[float]:
    return [value / max(length, 1) for value, length in zip(nats, lengths, strict=True)]


def _largest(values: Sequence[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
