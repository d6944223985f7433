"""`benchmarks/recipe_rules.py`: the best rate out of bowls."""

import importlib
import json
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


def test_the_bottoms_of_the_bowls_are_found(recipe_rules):
    found = recipe_rules.bowls({"rows": [row for case in CASES for row in reversed(bowl(*case))]})
    assert [each["best"] for each in found] == pytest.approx([best(*case[1:]) for case in CASES])


def test_a_bowl_without_a_bottom_has_no_best_rate(recipe_rules):
    (found,) = recipe_rules.bowls({"rows": bowl("f", 9e6, 1e6, 64, rates=(2.0, 4.0, 8.0))})
    assert found["best"] is None


def test_the_rule_lies_near_the_bottoms_that_were_measured(recipe_rules):
    result = json.loads((FOLDER / "results" / "recipe-rates.json").read_text())
    whole = [each for each in recipe_rules.bowls(result) if each["best"] is not None]
    assert len({each["parameters"] for each in whole}) >= 3
    for each in whole:
        assert each["rule"] == pytest.approx(each["best"], rel=0.25), each["name"]


def test_the_picture_shows_each_bowl_from_its_lowest_point(recipe_rules, monkeypatch, tmp_path):
    monkeypatch.setattr(recipe_rules, "PICTURE", tmp_path / "rates.png")
    recipe_rules.draw(recipe_rules.bowls({"rows": bowl(*CASES[0])}))
    assert (tmp_path / "rates.png").read_bytes().startswith(b"\x89PNG")
