"""Multiple choice tasks: a record of a dataset -> contexts, continuations and the answer, in the words of lm-evaluation-harness.

The prompts are those of the harness's task files (github.com/EleutherAI/lm-evaluation-harness, lm_eval/tasks), zero-shot, without a
chat template; a space stands between context and choice. Records carry the hub's field names.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lumi.config import UserError
from lumi.evaluation.records import HubSource, JsonlSource, Record, check_unicode, text_field

TaskKind = Literal["boolq", "hellaswag", "arc", "piqa", "winogrande"]


class Question(NamedTuple):
    """One example: a context and a choice per option, and the place of the right one."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A multiple choice task: `kind` is its prompt and scoring, `source` the records; `limit` takes the first so many of them."""

    kind: TaskKind
    name: str
    source: HubSource | JsonlSource
    limit: int | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError('name must be a name for the results, got ""')
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all, got {self.limit}")


class Task(NamedTuple):
    """How a kind of task is asked and scored. `protocol` says it in words; `normalised`: whether acc_norm is reported as well."""

    ask: Callable[[Record, str], Question]
    protocol: str
    normalised: bool = True


def boolq(record: Record, place: str) -> Question:
    """BoolQ (Clark et al. 2019, arXiv:1905.10044), a yes/no question on a passage."""
    answer = record.get("answer", record.get("label"))  # super_glue has the same data with an integer `label`
    if answer not in (0, 1):
        raise UserError(f"{place}: 'answer' must be true or false, got {answer!r}")
    context = (
        f"{text_field(record, 'passage', place)}\nQuestion: {text_field(record, 'question', place)}?\nAnswer:"
    )
    return _question(context, ["no", "yes"], int(answer), place)


def hellaswag(record: Record, place: str) -> Question:
    """HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which sentence goes on."""
    label = text_field(record, "activity_label", place)
    story = f"{text_field(record, 'ctx_a', place)} {text_field(record, 'ctx_b', place).capitalize()}"
    endings = [clean_wikihow(ending) for ending in _texts(record.get("endings"), "endings", place)]
    return _question(clean_wikihow(f"{label}: {story}"), endings, _integer(record, "label", place), place)


def arc(record: Record, place: str) -> Question:
    """ARC, easy and challenge (Clark et al. 2018, arXiv:1803.05457): questions of school exams."""
    choices = record.get("choices")
    if not isinstance(choices, dict):
        raise UserError(
            f"{place}: 'choices' must be an object with 'text' and 'label', got {type(choices).__name__}"
        )
    labels, texts = (_texts(choices.get(name), f"choices.{name}", place) for name in ("label", "text"))
    if len(labels) != len(texts):
        raise UserError(
            f"{place}: 'choices' must have as many texts as labels, got {len(texts)} and {len(labels)}"
        )
    key = text_field(record, "answerKey", place)
    if key not in labels:
        raise UserError(f"{place}: 'answerKey' must be one of {', '.join(labels)}, got {key!r}")
    context = f"Question: {text_field(record, 'question', place)}\nAnswer:"
    return _question(context, texts, labels.index(key), place)


def piqa(record: Record, place: str) -> Question:
    """PIQA (Bisk et al. 2020, arXiv:1911.11641): which of two ways reaches a goal."""
    context = f"Question: {text_field(record, 'goal', place)}\nAnswer:"
    solutions = [text_field(record, "sol1", place), text_field(record, "sol2", place)]
    return _question(context, solutions, _integer(record, "label", place), place)


def winogrande(record: Record, place: str) -> Question:
    """WinoGrande (Sakaguchi et al. 2019, arXiv:1907.10641), partial scoring (Trinh and Le 2018, arXiv:1806.02847): each option is put
    into the sentence, and what follows it is scored."""
    before, blank, after = text_field(record, "sentence", place).partition("_")
    if not blank:
        raise UserError(f"{place}: 'sentence' must hold the blank '_', got none")
    options = [text_field(record, "option1", place), text_field(record, "option2", place)]
    answer = _integer(record, "answer", place) - 1
    if answer not in (0, 1):
        raise UserError(f"{place}: 'answer' must be 1 or 2, got {answer + 1}")
    return Question(tuple(before + option for option in options), (after.strip(),) * 2, answer)


def clean_wikihow(text: str) -> str:
    """HellaSwag's text without what its WikiHow half was marked up with: "[title]" ends a sentence, other "[...]" is nothing."""
    without_titles = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", without_titles).replace("  ", " ")


TASKS: dict[str, Task] = {
    "boolq": Task(
        boolq, "'{passage}\\nQuestion: {question}?\\nAnswer:' with ' no' / ' yes'", normalised=False
    ),
    "hellaswag": Task(hellaswag, "'{activity_label}: {ctx_a} {Ctx_b}' without [...] marks, with ' {ending}'"),
    "arc": Task(arc, "'Question: {question}\\nAnswer:' with ' {choice}'"),
    "piqa": Task(piqa, "'Question: {goal}\\nAnswer:' with ' {sol1}' / ' {sol2}'"),
    "winogrande": Task(
        winogrande,
        "partial: the sentence up to and with each option, scored by ' {the rest}'",
        normalised=False,
    ),
}


def _question(context: str, choices: list[str], answer: int, place: str) -> Question:
    if not 0 <= answer < len(choices):
        raise UserError(
            f"{place}: the answer must be the place of one of {len(choices)} choices, counted from 0, got {answer}"
        )
    return Question((context,) * len(choices), tuple(choices), answer)


def _integer(record: Record, name: str, place: str) -> int:
    value = record.get(name)
    if isinstance(value, int) or (
        isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value)
    ):  # "²" is a digit, too
        return int(value)
    raise UserError(
        f"{place}: {name!r} must be an integer, got {repr(value)[:60]}: is this a split without answers?"
    )


def _texts(value: object, name: str, place: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        raise UserError(f"{place}: {name!r} must be a list of at least two strings, got {str(value)[:60]}")
    for number, text in enumerate(value, start=1):
        check_unicode(text, f"{name} {number}", place)
    return value
