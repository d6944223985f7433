import math

import pytest

from lumi.evaluation.centred_mean import centred_mean


def test_by_hand():
    tasks = {
        "four choices": {"acc": 0.4, "acc_stderr": 0.03, "chance": 0.25},
        "a word": {"acc": 0.1, "acc_stderr": 0.02, "chance": 0.0},
        "worse than guessing": {"acc": 0.4, "acc_stderr": 0.05, "chance": 0.5},
    }
    found = centred_mean(tasks)
    assert found["value"] == pytest.approx((0.15 / 0.75 + 0.1 - 0.1 / 0.5) / 3)
    assert found["stderr"] == pytest.approx(math.sqrt(0.04**2 + 0.02**2 + 0.1**2) / 3)
    assert found["tasks"] == list(tasks)
    alone = tasks["a word"] | {"acc_stderr": None}  # of one example
    assert centred_mean(tasks | {"a word": alone})["stderr"] is None


def test_one_task_is_no_mean():
    assert centred_mean({"t": {"acc": 0.4, "acc_stderr": 0.03, "chance": 0.25}}) is None
