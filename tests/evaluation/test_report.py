"""Numbers as they are printed."""

import pytest

from lumi.evaluation.report import Figure, _count, _number, figures_table


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
