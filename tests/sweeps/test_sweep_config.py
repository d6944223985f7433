import pytest

from lumi.config import UserError, from_dict
from lumi.sweeps.sweep_config import Halving, SweepConfig

GRID = {"kind": "grid", "values": {"optimizer.peak_lr": [0.1, 0.2]}}
RANDOM = {"kind": "random", "values": {"optimizer.peak_lr": {"kind": "log_uniform", "low": 0.1, "high": 1}}}

CONTENDERS = {"kind": "contenders", "grids": {"a": {"optimizer.peak_lr": [0.1, 0.2]}}}


def made(**changes):
    return from_dict(SweepConfig, {"config": "c", "search": GRID} | changes, "s.json")


def ranged(**source):
    return {"kind": "random", "values": {"a": source}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"search": {"kind": "grid", "values": {}}}, "search.values must name at least one key"),
        (
            {"search": {"kind": "grid", "values": {"a": []}}},
            "search values.a must list at least one value, got none",
        ),
        ({"search": {"kind": "grid", "values": {"seed": [1]}}}, "search values.seed must be left out"),
        ({"search": {"kind": "random", "values": {}}}, "search.values must name at least one key"),
        ({"budget": {"trials": 0}}, "budget.trials must be at least 1, got 0"),
        ({"budget": {"minutes": 0}}, "budget.minutes must be above 0, got 0.0"),
        ({"seeds": []}, "seeds must be one or more numbers, all different, got []"),
        ({"seeds": [1, 1]}, "seeds must be one or more numbers, all different, got [1, 1]"),
        ({"seeds": [0, 1], "budget": {"trials": 1}}, "budget.trials must be at least 2, one for each"),
        ({"search": RANDOM}, "budget.trials must say how many runs a random search may take, got null"),
        ({"search": ranged(kind="uniform", low=2, high=2)}, "search.values.a.high must be above low = 2"),
        ({"search": ranged(kind="log_uniform", low=0, high=2)}, "search.values.a.low must be above 0"),
        ({"search": ranged(kind="log_uniform", low=3, high=2)}, "search.values.a.high must be above low"),
        ({"search": ranged(kind="choice", values=[])}, "search.values.a.values must list at least one"),
        ({"search": CONTENDERS | {"grids": {}}}, "search.grids must name at least one contender, got none"),
        ({"search": CONTENDERS | {"grids": {"a": {}}}}, "search grids.a must name at least one key"),
        ({"search": CONTENDERS | {"grids": {"a": {"b": []}}}}, "search grids.a.b must list at least one"),
        ({"search": CONTENDERS | {"grids": {"a": {"seed": [1]}}}}, "search grids.a.seed must be left out"),
        ({"search": CONTENDERS, "budget": {"trials": 3}}, "budget.trials must be null with contenders"),
        ({"search": CONTENDERS, "halving": {"rungs": [4]}}, "halving must be null with contenders"),
        ({"halving": {"rungs": []}}, "halving.rungs must be ascending steps from 1 on, got []"),
        ({"halving": {"rungs": [8, 4]}}, "halving.rungs must be ascending steps from 1 on, got [8, 4]"),
        ({"halving": {"rungs": [4], "keep": 1}}, "halving.keep must be between 0 and 1, got 1.0"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(UserError) as refused:
        made(**changes)
    assert str(refused.value).startswith(f"s.json: {message}")


def test_the_budget_counts_seeds():
    assert made(seeds=[0, 1, 2], budget={"trials": 8}).num_settings == 2
    assert made().num_settings is None


def test_one_setting_at_least_survives_a_rung():
    halving = Halving(rungs=(4,), keep=0.3)
    assert [halving.survivors(number) for number in (1, 3, 4, 10)] == [1, 1, 2, 3]
