"""Numbers as they are printed."""

import pytest

from lumi.config import UserError
from lumi.evaluation.report import Figure, _count, _number, figures, figures_table


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "n/a"),
        (1.23456, "1.235"),
        (999.96, "1000"),
        (9999.4, "9999"),
        (9999.5, "9,999.5"),
        (9999.96, "10,000.0"),
        (12345.67, "12,345.7"),
        (999_999.0, "999,999.0"),
        (1e6, "1.000e+06"),
    ],
)
def test_numbers(value, text):
    assert _number(value) == text


def test_one_is_singular():
    assert (_count(1, "example"), _count(0, "token"), _count(3270, "example")) == (
        "1 example",
        "0 tokens",
        "3,270 examples",
    )


def test_each_protocol_is_said_once_and_no_empty_column_is_shown():
    texts = [Figure("a", metric, "1", "", "9", "long") for metric in ("x", "y")]
    assert figures_table([*texts, Figure("b", "x", "2", "", "8", "other <s>")]) == [
        "|  | metric | value | of | protocol |",
        "| --- | --- | --- | --- | --- |",
        "| a | x | 1 | 9 | 1 |",
        "| a | y | 1 | 9 | 1 |",
        "| b | x | 2 | 8 | 2 |",
        "",
        "Protocols:",
        "",
        "1. long",
        "2. other \\<s>",
    ]
    task = Figure("c", "acc", "3", "chance 50%", "7", "long")
    assert figures_table([*texts, task])[4] == "| c | acc | 3 | chance 50% | 7 | 1 |"
    assert len(figures_table([])) == 2


def task(**changes):
    means = {"bits_per_byte": 2.5, "margin": -0.0125, "perplexity": None, "acc": 0.25, "acc_norm": 0.5}
    return {
        **{"kind": "arc", "source": "jsonl: x", "limit": None, "few_shot": None, "examples": 9},
        **{"cut_contexts": 0, "chance": 0.25, "majority": 0.3},
        **means,
        **{f"{name}_stderr": None if value is None else 0.01 for name, value in means.items()},
        **changes,
    }


def shown(tasks, **changes):
    results = {"tasks": tasks, "centred_mean": None, "perplexity": {}, "smoke_tests": None}
    return [figure[:4] for figure in figures(results | changes)]


def test_bits_per_byte_and_margin_come_first():
    guessing = "majority 30.00%, chance 25.00%"
    assert shown({"a": task()}) == [
        ("a", "bits per byte", "2.5000 ± 0.0100", ""),
        ("a", "margin", "-0.0125 ± 0.0100", "chance 0"),
        ("a", "acc", "25.00% ± 1.00%", guessing),
        ("a", "acc_norm", "50.00% ± 1.00%", guessing),
    ]
    word = {"kind": "lambada", "margin": None, "acc_norm": None, "chance": 0.0, "majority": None}
    assert shown({"w": task(**word, perplexity=1234.5, perplexity_stderr=10.0)}) == [
        ("w", "bits per byte", "2.5000 ± 0.0100", ""),
        ("w", "perplexity", "1234 ± 10", ""),
        ("w", "acc", "25.00% ± 1.00%", ""),
    ]


def test_the_centred_mean_says_what_it_is_over():
    centred = {"value": 0.125, "stderr": None, "tasks": ["a", "b"]}
    assert shown({}, centred_mean=centred) == [("all tasks", "centred acc", "0.1250", "chance 0")]
    [figure] = figures(
        {"tasks": {}, "centred_mean": centred, "perplexity": {}, "smoke_tests": None},
    )
    assert figure.protocol.startswith(
        "mean of (acc - chance) / (1 - chance) over a, b, as DataComp-LM's CORE"
    )
    assert figure.number == "2 tasks"


def test_results_of_an_earlier_version_are_refused():
    with pytest.raises(
        UserError, match="evaluation results must be of this version of Lumi, got those of an"
    ):
        figures({"tasks": {}, "perplexity": {}, "smoke_tests": None})
