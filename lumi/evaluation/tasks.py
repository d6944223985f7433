"""Tasks: a record of a dataset -> contexts, choices and the place of the answer.

The prompts are those of the harness's task files (github.com/EleutherAI/lm-evaluation-harness,
lm_eval/tasks): without a chat template, with a space between context and choice. Records carry the hub's
field names. A text to be completed is a question with one choice: greedy decoding must give it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

from lumi.config import UserError
from lumi.corpus.raw_records import Fields
from lumi.corpus.sources import HubDataset, JsonFiles, JsonlFiles
from lumi.evaluation.few_shot import FewShotConfig
from lumi.evaluation.records import check_unicode, text_field

TaskKind = Literal[
    "boolq",
    "hellaswag",
    "arc",
    "piqa",
    "winogrande",
    "openbookqa",
    "commonsense_qa",
    "sciq",
    "lambada",
    "blimp",
]
LETTERS = ("A", "B", "C", "D", "E")  # of CommonsenseQA


class Question(NamedTuple):
    """One example: per option a context and a choice, and the place of the right option."""

    contexts: tuple[str, ...]
    choices: tuple[str, ...]
    answer: int


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """A task. `kind`: prompt and scoring. `limit`: how many records of `source` it takes."""

    kind: TaskKind
    # The name in the results.
    name: str
    source: HubDataset | JsonlFiles | JsonFiles
    limit: int | None = None
    # Solved examples before each question; null: none (zero-shot).
    few_shot: FewShotConfig | None = None

    def __post_init__(self) -> None:
        if not self.name:
            raise ValueError('name must be a name for the results, got ""')
        if self.limit is not None and self.limit < 1:
            raise ValueError(f"limit must be at least 1, or null for all, got {self.limit}")
        if self.few_shot is not None and self.kind == "blimp":
            raise ValueError("few_shot must be null for blimp, whose sentences have no context, got examples")


class Task(NamedTuple):
    """How a kind of task is asked and scored.

    Attributes:
        ask: a record and its place, for messages -> the question.
        protocol: in words.
        normalised: it has an acc_norm, too.
        is_shuffled: the right choice stands at different places, so that always giving one of them is a
            baseline.
        has_test_split: in the harness. It then takes the examples from another split, and does not look for
            the question among them.
        solution_delimiter: between the context and the answer of a solved example.
    """

    ask: Callable[[Fields, str], Question]
    protocol: str
    normalised: bool = True
    is_shuffled: bool = True
    has_test_split: bool = False
    solution_delimiter: str = " "


def boolq(record: Fields, place: str) -> Question:
    """BoolQ (Clark et al. 2019, arXiv:1905.10044): a yes/no question on a passage."""
    answer = record.get("answer", record.get("label"))  # super_glue has the same data with an integer `label`
    if answer not in (0, 1):
        raise UserError(f"{place}: 'answer'", "must be true or false", got=repr(answer))
    passage, question = text_field(record, "passage", place), text_field(record, "question", place)
    return _question(f"{passage}\nQuestion: {question}?\nAnswer:", ["no", "yes"], int(answer), place)


def hellaswag(record: Fields, place: str) -> Question:
    """HellaSwag (Zellers et al. 2019, arXiv:1905.07830): which ending continues the story."""
    label = text_field(record, "activity_label", place)
    story = f"{text_field(record, 'ctx_a', place)} {text_field(record, 'ctx_b', place).capitalize()}"
    endings = [clean_wikihow(ending) for ending in _texts(record.get("endings"), "endings", place)]
    return _question(clean_wikihow(f"{label}: {story}"), endings, _integer(record, "label", place), place)


def arc(record: Fields, place: str) -> Question:
    """ARC, easy and challenge (Clark et al. 2018, arXiv:1803.05457): questions of school exams."""
    texts, answer = _labelled(record, text_field(record, "answerKey", place), place)
    return _question(f"Question: {text_field(record, 'question', place)}\nAnswer:", texts, answer, place)


def openbookqa(record: Fields, place: str) -> Question:
    """OpenBookQA (Mihaylov et al. 2018, arXiv:1809.02789): elementary science, without the book."""
    texts, answer = _labelled(record, text_field(record, "answerKey", place).lstrip(), place)
    return _question(text_field(record, "question_stem", place), texts, answer, place)


def commonsense_qa(record: Fields, place: str) -> Question:
    """CommonsenseQA (Talmor et al. 2019, arXiv:1811.00937): five choices are shown, a letter is scored."""
    key = text_field(record, "answerKey", place)
    texts, answer = _labelled(record, key, place)
    if len(texts) != len(LETTERS) or LETTERS[answer] != key:
        expectation = f"must be five with the labels {', '.join(LETTERS)}"
        raise UserError(
            f"{place}: 'choices'", expectation, got=f"{len(texts)} with {key} as number {answer + 1}"
        )
    shown = "".join(f"{letter}. {text}\n" for letter, text in zip(LETTERS, texts, strict=True))
    context = f"Question: {text_field(record, 'question', place).strip()}\n{shown}Answer:"
    return _question(context, list(LETTERS), answer, place)


def sciq(record: Fields, place: str) -> Question:
    """SciQ (Welbl et al. 2017, arXiv:1707.06209): science questions after the passage that answers them."""
    support, question = text_field(record, "support", place).lstrip(), text_field(record, "question", place)
    names = ("distractor1", "distractor2", "distractor3", "correct_answer")
    choices = [text_field(record, name, place) for name in names]
    return _question(f"{support}\nQuestion: {question}\nAnswer:", choices, 3, place)


def lambada(record: Fields, place: str) -> Question:
    """LAMBADA (Paperno et al. 2016, arXiv:1606.06031) in OpenAI's form: the last word of a passage."""
    context, _, word = text_field(record, "text", place).rpartition(" ")
    if not word:
        raise UserError(f"{place}: 'text'", "must end with a word", got="a space at the end, or nothing")
    return Question((context,), (word,), 0)


def blimp(record: Fields, place: str) -> Question:
    """BLiMP (Warstadt et al. 2020, arXiv:1912.00582): of two sentences, one is good English."""
    sentences = [text_field(record, name, place) for name in ("sentence_good", "sentence_bad")]
    return _question("", sentences, 0, place)


def piqa(record: Fields, place: str) -> Question:
    """PIQA (Bisk et al. 2020, arXiv:1911.11641): which of two solutions reaches a goal."""
    context = f"Question: {text_field(record, 'goal', place)}\nAnswer:"
    solutions = [text_field(record, "sol1", place), text_field(record, "sol2", place)]
    return _question(context, solutions, _integer(record, "label", place), place)


def winogrande(record: Fields, place: str) -> Question:
    """WinoGrande (Sakaguchi et al. 2019, arXiv:1907.10641): which option fills the blank of a sentence.

    Partial scoring (Trinh and Le 2018, arXiv:1806.02847): each option is put into the sentence, and the
    text after it is scored.
    """
    before, blank, after = text_field(record, "sentence", place).partition("_")
    if not blank:
        raise UserError(f"{place}: 'sentence'", "must hold the blank '_'", got="none")
    options = [text_field(record, "option1", place), text_field(record, "option2", place)]
    answer = _integer(record, "answer", place) - 1
    if answer not in (0, 1):
        raise UserError(f"{place}: 'answer'", "must be 1 or 2", got=answer + 1)
    return Question(tuple(before + option for option in options), (after.strip(),) * 2, answer)


def clean_wikihow(text: str) -> str:
    """HellaSwag's text without the markup of its WikiHow half: "[title]" ends a sentence."""
    without_titles = text.strip().replace(" [title]", ". ")
    return re.sub(r"\[.*?\]", "", without_titles).replace("  ", " ")


TASKS: dict[str, Task] = {
    "boolq": Task(
        boolq, r"'{passage}\nQuestion: {question}?\nAnswer:' with ' no' / ' yes'", normalised=False
    ),
    "hellaswag": Task(hellaswag, "'{activity_label}: {ctx_a} {Ctx_b}' without [...] marks, with ' {ending}'"),
    "arc": Task(arc, "'Question: {question}\\nAnswer:' with ' {choice}'", has_test_split=True),
    "piqa": Task(piqa, "'Question: {goal}\\nAnswer:' with ' {sol1}' / ' {sol2}'"),
    "winogrande": Task(
        winogrande,
        "partial: the sentence up to and with each option, scored by ' {the rest}'",
        normalised=False,
    ),
    "openbookqa": Task(openbookqa, "'{question_stem}' with ' {choice}'", has_test_split=True),
    "commonsense_qa": Task(
        commonsense_qa,
        r"'Question: {question}\nA. {choice}\n ... E. {choice}\nAnswer:' with ' A' to ' E'",
        normalised=False,
    ),
    "sciq": Task(
        sciq,
        r"'{support}\nQuestion: {question}\nAnswer:' with ' {distractor or correct_answer}'",
        is_shuffled=False,
        has_test_split=True,
    ),
    "lambada": Task(
        lambada,
        "the text without its last word, with ' {word}'",
        normalised=False,
        is_shuffled=False,
        has_test_split=True,
        solution_delimiter="  ",  # the harness puts one before its target, which begins with another
    ),
    "blimp": Task(
        blimp,
        "' {sentence_good}' / ' {sentence_bad}' after the token that begins a text",
        normalised=False,
        is_shuffled=False,
    ),
}


def _question(context: str, choices: list[str], answer: int, place: str) -> Question:
    if not 0 <= answer < len(choices):
        expectation = f"must be the place of one of {len(choices)} choices, counted from 0"
        raise UserError(f"{place}: the answer", expectation, got=answer)
    return Question((context,) * len(choices), tuple(choices), answer)


def _labelled(record: Fields, key: str, place: str) -> tuple[list[str], int]:
    """The texts of `choices`, and the place of the one whose label is the key."""
    choices = record.get("choices")
    if not isinstance(choices, dict):
        got = type(choices).__name__
        raise UserError(f"{place}: 'choices'", "must be an object with 'text' and 'label'", got=got)
    labels, texts = (_texts(choices.get(name), f"choices.{name}", place) for name in ("label", "text"))
    if len(labels) != len(texts):
        got = f"{len(texts)} and {len(labels)}"
        raise UserError(f"{place}: 'choices'", "must have as many texts as labels", got=got)
    if key not in labels:
        raise UserError(f"{place}: 'answerKey'", f"must be one of {', '.join(labels)}", got=repr(key))
    return texts, labels.index(key)


def _integer(record: Fields, name: str, place: str) -> int:
    value = record.get(name)
    if isinstance(value, str) and re.fullmatch("[0-9]{1,9}", value):  # isdigit() would take "²"
        value = int(value)
    if isinstance(value, int):
        return int(value)
    got = f"{repr(value)[:60]}: is this a split without answers?"
    raise UserError(f"{place}: {name!r}", "must be an integer", got=got)


def _texts(value: object, name: str, place: str) -> list[str]:
    if not isinstance(value, list) or len(value) < 2 or not all(isinstance(item, str) for item in value):
        got = str(value)[:60]
        raise UserError(f"{place}: {name!r}", "must be a list of at least two strings", got=got)
    for number, text in enumerate(value, start=1):
        check_unicode(text, f"{name} {number}", place)
    return value
