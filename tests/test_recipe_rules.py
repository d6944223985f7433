"""`benchmarks/recipe_rules.py`: the best rate out of bowls."""

import importlib
import math
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture
def recipe_rules(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("recipe_rules")


def best(parameters, tokens, batch):
    return 3.0 * parameters**-0.4 * tokens**-0.1 * batch**0.3


def bowl(name, parameters, tokens, batch, rates=(0.4, 0.8, 1.6, 3.2)):
    """Rows of a bowl whose bottom lies at the true rule; `rates` are multiples of it."""
    bottom = best(parameters, tokens, batch)
    return [
        {
            "contender": name,
            "values": {"optimizer.peak_lr": factor * bottom},
            "bits_per_byte": [1.5 + 0.01 * math.log(factor) ** 2],
            "parameters": parameters,
            "tokens": tokens,
            "batch_tokens": batch,
        }
        for factor in rates
    ]


CASES = (
    ("a", 1e6, 2e6, 4096),
    ("b", 1e6, 2e6, 16384),
    ("c", 1e6, 1e7, 4096),
    ("d", 4e6, 8e6, 4096),
    ("e", 2e6, 2e7, 8192),
)


def test_the_rule_that_made_the_bowls_is_found(recipe_rules):
    found = recipe_rules.bowls({"rows": [row for case in CASES for row in reversed(bowl(*case))]})
    assert [each["best"] for each in found] == pytest.approx([best(*case[1:]) for case in CASES])
    rule = recipe_rules.fit(found)
    expected = {"factor": 3.0, "parameters": -0.4, "tokens": -0.1, "batch_tokens": 0.3}
    assert {name: rule[name] for name in expected} == pytest.approx(expected)
    assert rule["rms"] == pytest.approx(0, abs=1e-9)


def test_a_bowl_without_a_bottom_has_no_best_rate_and_no_part_in_the_rule(recipe_rules):
    rows = [row for case in CASES for row in bowl(*case)] + bowl("f", 9e6, 1e6, 64, rates=(2.0, 4.0, 8.0))
    found = recipe_rules.bowls({"rows": rows})
    assert found[-1]["best"] is None
    assert recipe_rules.fit(found)["tokens"] == pytest.approx(-0.1)


def test_too_few_bowls_are_refused(recipe_rules):
    found = recipe_rules.bowls({"rows": [row for case in CASES[:3] for row in bowl(*case)]})
    with pytest.raises(
        SystemExit, match="3 bowls with a bottom are too few, or too alike, for three exponents"
    ):
        recipe_rules.fit(found)


def test_the_picture_shows_each_bowl_from_its_lowest_point(recipe_rules, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe_rules, "PICTURE", tmp_path / "rates.png")
    recipe_rules.draw(recipe_rules.bowls({"rows": bowl(*CASES[0])}))
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
