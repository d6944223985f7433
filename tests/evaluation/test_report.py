"""Numbers as they are printed."""

import pytest

from lumi.evaluation.report import _count, _number


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
