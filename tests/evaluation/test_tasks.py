"""Every prompt, spelt out for one record."""

import pytest

from lumi.config import UserError, from_dict
from lumi.evaluation.tasks import TASKS, Question, TaskConfig, clean_wikihow

BOOLQ = {"question": "is the sky blue", "passage": "The sky is blue.", "answer": True}
HELLASWAG = {
    "activity_label": "Baking [title] bread",
    "ctx_a": "[header] How to bake [title] Knead it.",
    "ctx_b": "the Dough",
    "endings": ["rises. [substeps] Well.", "falls."],
    "label": "1",
}
ARC = {
    "question": "What melts?",
    "choices": {"text": ["ice", "sand", "air"], "label": ["A", "B", "C"]},
    "answerKey": "B",
}
PIQA = {"goal": "open a jar", "sol1": "turn the lid", "sol2": "eat it", "label": 0}
WINOGRANDE = {
    "sentence": "Ann met Bea because _ was in town.",
    "option1": "Ann",
    "option2": "Bea",
    "answer": "2",
}
OPENBOOKQA = {
    "question_stem": "Ice melts in",
    "choices": {"text": ["heat", "cold"], "label": ["A", "B"]},
    "answerKey": " A",
}
COMMONSENSE_QA = {
    "question": " Where is light? ",
    "choices": {"text": ["a cave", "a box", "the sun", "a sack", "ink"], "label": list("ABCDE")},
    "answerKey": "C",
}
SCIQ = {"support": "  Ice melts.", "question": "What melts?", "correct_answer": "ice"}
SCIQ |= {"distractor1": "sand", "distractor2": "air", "distractor3": "wood"}
BLIMP = {"sentence_good": "She sees herself.", "sentence_bad": "She sees itself."}


@pytest.mark.parametrize(
    ("kind", "record", "question"),
    [
        (
            "boolq",
            BOOLQ,
            Question(("The sky is blue.\nQuestion: is the sky blue?\nAnswer:",) * 2, ("no", "yes"), 1),
        ),
        (
            "boolq",
            {**BOOLQ, "answer": False},
            Question(("The sky is blue.\nQuestion: is the sky blue?\nAnswer:",) * 2, ("no", "yes"), 0),
        ),
        (
            "hellaswag",
            HELLASWAG,
            Question(("Baking. bread: How to bake. Knead it. The dough",) * 2, ("rises. Well.", "falls."), 1),
        ),
        ("arc", ARC, Question(("Question: What melts?\nAnswer:",) * 3, ("ice", "sand", "air"), 1)),
        ("piqa", PIQA, Question(("Question: open a jar\nAnswer:",) * 2, ("turn the lid", "eat it"), 0)),
        (
            "winogrande",
            WINOGRANDE,
            Question(("Ann met Bea because Ann", "Ann met Bea because Bea"), ("was in town.",) * 2, 1),
        ),
        ("openbookqa", OPENBOOKQA, Question(("Ice melts in",) * 2, ("heat", "cold"), 0)),
        (
            "commonsense_qa",
            COMMONSENSE_QA,
            Question(
                ("Question: Where is light?\nA. a cave\nB. a box\nC. the sun\nD. a sack\nE. ink\nAnswer:",)
                * 5,
                ("A", "B", "C", "D", "E"),
                2,
            ),
        ),
        (
            "sciq",
            SCIQ,
            Question(("Ice melts.\nQuestion: What melts?\nAnswer:",) * 4, ("sand", "air", "wood", "ice"), 3),
        ),
        (
            "lambada",
            {"text": "She saw a  river and, at last, the sea"},
            Question(("She saw a  river and, at last, the",), ("sea",), 0),
        ),
        ("lambada", {"text": "alone"}, Question(("",), ("alone",), 0)),
        ("blimp", BLIMP, Question(("",) * 2, ("She sees herself.", "She sees itself."), 0)),
    ],
)
def test_prompts(kind, record, question):
    assert TASKS[kind].ask(record, "here") == question


def test_hellaswag_is_cleaned():
    assert clean_wikihow("  Do it [title] Now [step] go.  [x]Yes ") == "Do it. Now go. Yes"


@pytest.mark.parametrize(
    ("kind", "record", "message"),
    [
        ("boolq", {**BOOLQ, "answer": "yes"}, "here: 'answer' must be true or false, got 'yes'"),
        (
            "boolq",
            {"question": "x", "answer": True},
            "here: 'passage' must be a string, got no such field (it has question, answer)",
        ),
        (
            "hellaswag",
            {**HELLASWAG, "label": ""},
            "here: 'label' must be an integer, got '': is this a split without answers?",
        ),
        (
            "hellaswag",
            {**HELLASWAG, "label": "2"},
            "here: the answer must be the place of one of 2 choices, counted from 0, got 2",
        ),
        (
            "hellaswag",
            {**HELLASWAG, "endings": "x"},
            "here: 'endings' must be a list of at least two strings, got x",
        ),
        (
            "arc",
            {**ARC, "choices": ["a"]},
            "here: 'choices' must be an object with 'text' and 'label', got list",
        ),
        ("arc", {**ARC, "answerKey": "D"}, "here: 'answerKey' must be one of A, B, C, got 'D'"),
        (
            "arc",
            {**ARC, "choices": {"text": ["ice", "sand"], "label": ["A", "B", "C"]}},
            "here: 'choices' must have as many texts as labels, got 2 and 3",
        ),
        (
            "piqa",
            {**PIQA, "label": "²"},
            "here: 'label' must be an integer, got '²': is this a split without answers?",
        ),
        (
            "piqa",
            {**PIQA, "label": "9" * 5000},
            f"here: 'label' must be an integer, got '{'9' * 59}: is this a split without answers?",
        ),
        (
            "hellaswag",
            {**HELLASWAG, "endings": ["a", "b\udfff"]},
            "here: 'endings 2': text must be valid Unicode, got the lone surrogate U+DFFF at character 1",
        ),
        ("piqa", {**PIQA, "goal": 3}, "here: 'goal' must be a string, got int"),
        (
            "winogrande",
            {**WINOGRANDE, "sentence": "No blank."},
            "here: 'sentence' must hold the blank '_', got none",
        ),
        ("openbookqa", {**OPENBOOKQA, "answerKey": "C"}, "here: 'answerKey' must be one of A, B, got 'C'"),
        (
            "commonsense_qa",
            {**COMMONSENSE_QA, "choices": {"text": ["a", "b", "c"], "label": ["A", "B", "C"]}},
            "here: 'choices' must be five with the labels A, B, C, D, E, got 3 with C as number 3",
        ),
        (
            "commonsense_qa",
            {**COMMONSENSE_QA, "choices": {"text": list("abcde"), "label": list("CABDE")}},
            "here: 'choices' must be five with the labels A, B, C, D, E, got 5 with C as number 1",
        ),
        ("sciq", {**SCIQ, "distractor2": None}, "here: 'distractor2' must be a string, got NoneType"),
        (
            "lambada",
            {"text": "the sea "},
            "here: 'text' must end with a word, got a space at the end, or nothing",
        ),
        (
            "blimp",
            {"sentence_good": "x"},
            "here: 'sentence_bad' must be a string, got no such field (it has sentence_good)",
        ),
        ("winogrande", {**WINOGRANDE, "answer": "3"}, "here: 'answer' must be 1 or 2, got 3"),
    ],
)
def test_bad_records(kind, record, message):
    with pytest.raises(UserError) as error:
        TASKS[kind].ask(record, "here")
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"kind": "mmlu"},
            'kind must be one of "boolq", "hellaswag", "arc", "piqa", "winogrande", "openbookqa", '
            '"commonsense_qa", "sciq", "lambada", "blimp", got "mmlu"',
        ),
        ({"limit": 0}, "limit must be at least 1, or null for all, got 0"),
        ({"name": ""}, 'name must be a name for the results, got ""'),
        (
            {"kind": "blimp", "few_shot": {"num_fewshot": 1, "source": {"kind": "jsonl", "paths": ["x"]}}},
            "few_shot must be null for blimp, whose sentences have no context, got examples",
        ),
        (
            {"few_shot": {"num_fewshot": 0, "source": {"kind": "jsonl", "paths": ["x"]}}},
            "few_shot num_fewshot must be at least 1, got 0",
        ),
        ({"sauce": 1}, "sauce unknown key (value 1); did you mean 'source'?"),
        (
            {"source": {"kind": "text", "paths": ["x"]}},
            'source.kind must be one of "hub", "jsonl", "json", got "text"',
        ),
    ],
)
def test_bad_configs(change, message):
    data = {"kind": "boolq", "name": "b", "source": {"kind": "jsonl", "paths": ["x"]}}
    with pytest.raises(UserError) as error:
        from_dict(TaskConfig, data | change, "c")
    assert str(error.value) == f"c: {message}"
