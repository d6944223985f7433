"""`benchmarks/recipe_tables.py`: from sweeps to the tables of the results page."""

import importlib
import json
from pathlib import Path

import pytest
from runs import CONFIG

from lumi.config import from_dict
from lumi.training.run_config import TrainConfig

FOLDER = Path(__file__).parents[1]


@pytest.fixture
def recipe_tables(monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER / "benchmarks"))
    return importlib.import_module("recipe_tables")


def row(contender, rate, *bits, state="finished", **values):
    trials = [
        {"folder": f"trials/{rate:g}", "tokens": 640, "seconds": 2.0, "bits_per_byte": value}
        for value in bits
    ]
    return {
        "setting": f"{contender}: {rate}",
        "contender": contender,
        "values": {"optimizer.peak_lr": rate} | values,
        "state": state,
        "trials": trials,
    }


@pytest.fixture
def sweep(tmp_path):
    """Writes the folder of a sweep with these rows."""

    def sweep(*rows):
        (tmp_path / "tokens").mkdir()
        (tmp_path / "tokens" / "manifest.json").write_text(json.dumps({"inputs": {"corpus 0": "abcdef" * 8}}))
        folder = tmp_path / "changes"
        folder.mkdir()
        (folder / "base.json").write_text(json.dumps(CONFIG))
        (folder / "sweep.json").write_text(json.dumps({"data_dirs": [str(tmp_path / "tokens")]}))
        (folder / "results.json").write_text(json.dumps(rows))
        return folder

    return sweep


def test_a_table_has_the_best_rate_of_each_recipe_with_all_its_seeds(recipe_tables, sweep):
    folder = sweep(
        row("Muon", 0.02, 1.5),
        row("Muon", 0.01, 1.6, 1.8, 2.0),
        row("AdamW", 0.03, 1.8, 1.8, 1.8, **{"model.qk_norm": True}),
    )
    result = recipe_tables.take_in(folder, "1234567")
    parameters = from_dict(TrainConfig, CONFIG).model.num_parameters
    assert result["rows"][0]["parameters"] == parameters
    assert result["rows"][2]["parameters"] > parameters  # the weights of the norms
    head, _, muon, adamw, _, about = recipe_tables.table(result).splitlines()
    assert head == recipe_tables.HEAD
    # 1.8 +- 0.2 / sqrt(3)
    cells = "0.01 of 0.01, 0.02", f"{parameters:,}", "640", "1.600, 1.800, 2.000", "1.8000 ± 0.1155", ""
    assert muon == f"| Muon | {' | '.join(cells)} |"
    # 1.8/1.6 = +12.5%, 0%, 1.8/2.0 = -10%: the mean and its error by hand
    assert adamw.endswith("| 1.8000 ± 0.0000 | +0.8 ± 6.5 % |")
    assert recipe_tables.table(result, ["AdamW"]).splitlines()[2].startswith("| AdamW | 0.03 of 0.03 |")
    assert about.startswith("`benchmarks/recipe/changes.json`; ")
    assert about.endswith("commit 1234567, corpus abcdefabcdef.")


def test_a_sweep_that_is_not_finished_is_refused(recipe_tables, sweep):
    with pytest.raises(SystemExit, match="changes must be a finished sweep, got 1 settings without a result"):
        recipe_tables.take_in(sweep(row("Muon", 0.02, None, state="in progress")), "1234567")


def test_the_results_page_has_the_tables_of_the_stored_results(recipe_tables):
    page = recipe_tables.PAGE.read_text(encoding="utf-8")
    tables = recipe_tables.stored_tables()
    assert recipe_tables.page_with(page, tables) == page
    assert tables.keys() <= {path.stem for path in (FOLDER / "benchmarks" / "recipe").glob("*.json")}
    with pytest.raises(SystemExit, match="must have the marks of other"):
        recipe_tables.page_with(page, {"other": "table"})


def test_every_sweep_of_the_recipe_can_be_tried():
    from lumi.config import load_config
    from lumi.sweeps.settings import make_settings
    from lumi.sweeps.sweep_config import SweepConfig

    folder = FOLDER / "benchmarks" / "recipe"
    for path in folder.glob("*.json"):
        if path.stem != "base":
            config = load_config(SweepConfig, path)
            assert make_settings(config, folder / config.config)
