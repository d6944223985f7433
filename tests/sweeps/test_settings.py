import pytest

from lumi.config import UserError

RATES = (0.001, 0.003, 0.01, 0.03, 0.1)


def random_search(**values):
    return {"kind": "random", "values": values}


def test_a_grid_holds_every_combination_once(settings_of):
    values = {"optimizer.peak_lr": [0.01, 0.02], "optimizer.kind": ["adamw", "muon"]}
    settings = settings_of(search={"kind": "grid", "values": values})
    found = {(setting.config.optimizer.peak_lr, setting.config.optimizer.kind) for setting in settings}
    assert found == {(rate, kind) for rate in (0.01, 0.02) for kind in ("adamw", "muon")}
    assert len(settings) == 4
    assert [setting.index for setting in settings] == [0, 1, 2, 3]
    assert settings[0].overrides[1].startswith("optimizer.kind=")


def test_contenders_stand_in_their_order_and_may_vary_other_keys(settings_of):
    grids = {"b": {"optimizer.peak_lr": [0.02, 0.01]}, "a": {"optimizer.kind": ["muon"], "num_steps": [9]}}
    settings = settings_of(search={"kind": "contenders", "grids": grids})
    assert [setting.name for setting in settings] == [
        "b: optimizer.peak_lr=0.02",
        "b: optimizer.peak_lr=0.01",
        "a: optimizer.kind=muon num_steps=9",
    ]
    assert settings[2].config.num_steps == 9


def test_a_higher_budget_only_adds_settings(settings_of):
    few = settings_of(RATES, budget={"trials": 4}, seeds=[0, 1])
    all_of_them = settings_of(RATES, seeds=[0, 1])
    assert len(few) == 2
    assert few == all_of_them[:2]
    search = random_search(**{"optimizer.peak_lr": {"kind": "log_uniform", "low": 1e-4, "high": 1e-1}})
    drawn = settings_of(search=search, budget={"trials": 30})
    assert settings_of(search=search, budget={"trials": 9}) == drawn[:9]
    rates = sorted(setting.config.optimizer.peak_lr for setting in drawn)
    assert rates[0] >= 1e-4
    assert rates[-1] <= 1e-1
    assert sum(rate < 10**-2.5 for rate in rates) in range(9, 22)  # of 30: half of the range, by factors


def test_draws_from_choices_and_between_two_numbers(settings_of):
    values = {
        "optimizer.kind": {"kind": "choice", "values": ["adamw", "muon"]},
        "optimizer.weight_decay": {"kind": "uniform", "low": 0.1, "high": 0.2},
    }
    drawn = settings_of(search=random_search(**values), budget={"trials": 20})
    assert {setting.config.optimizer.kind for setting in drawn} == {"adamw", "muon"}
    assert all(0.1 <= setting.config.optimizer.weight_decay <= 0.2 for setting in drawn)
    other = settings_of(search=random_search(**values) | {"seed": 1}, budget={"trials": 20})
    assert [setting.values for setting in other] != [setting.values for setting in drawn]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"search": {"kind": "grid", "values": {"optimizer.peek_lr": [1]}}},
            "search: optimizer.peek_lr=1: {base}: optimizer.peek_lr unknown key (value 1)",
        ),
        ({"rates": (0.01, 1e-2)}, "search: settings must differ, got optimizer.peak_lr=0.01 and optimizer"),
        ({"rates": (-1.0,)}, "search: optimizer.peak_lr=-1.0: {base}: optimizer peak_lr must"),
        (
            {
                "search": random_search(
                    **{"optimizer.kind": {"kind": "choice", "values": ["adamw", "muon"]}}
                ),
                "budget": {"trials": 3},
            },
            "budget.trials must be at most 2, as search has only 2 settings that differ, got 3",
        ),
        ({"base": {"model": None}}, "{base}: must be one of pre-training, with a model"),
        ({"halving": {"rungs": [12]}}, "halving.rungs must be below num_steps = 12, got 12"),
        ({"halving": {"rungs": [3]}}, "halving.rungs must be multiples of validate_every = 4, got 3"),
        (
            {
                "search": {"kind": "grid", "values": {"num_steps": [12, 24]}},
                "halving": {"rungs": [4]},
            },
            "halving must be null where settings differ in num_steps or optimizer.schedule or batches",
        ),
    ],
)
def test_what_cannot_be_tried_is_refused(changes, message, settings_of, tmp_path):
    with pytest.raises(UserError) as refused:
        settings_of(**changes)
    assert str(refused.value).startswith(message.format(base=tmp_path / "base.json"))
    assert "\n" not in str(refused.value)


def test_schedules_of_other_kinds_are_not_compared_at_a_rung(settings_of):
    values = {"optimizer.schedule.final_lr_ratio": [0.0, 0.1]}
    search = {"kind": "grid", "values": values}
    assert len(settings_of(search=search)) == 2
    with pytest.raises(UserError, match=r"final_lr_ratio was 0\.\d, is 0\.\d now; losses of the same step"):
        settings_of(search=search, halving={"rungs": [4]})
