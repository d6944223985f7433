import json
import math

import pytest
from written_runs import train_record, write_run

from lumi.sweeps.results import describe, make_rows, standard_error, write_results
from lumi.sweeps.trial import Trial


@pytest.fixture
def trials(settings_of, tmp_path):
    """Four settings of two seeds: best, worse, given up at step 4, and one that failed."""
    settings = settings_of((0.01, 0.02, 0.03, 0.04))
    bits = {0: (1.2, 1.4), 1: (1.5, 1.5), 2: (9.0, 8.0), 3: (1.0, None)}

    def written(setting, seed):
        result = bits[setting.index][seed]
        records = [train_record(4, 2.0)]
        if result is not None:
            records.append({"step": 4, "kind": "validation", "loss": 1.0, "bits_per_byte": result})
        status = "failed" if result is None else "preempted" if setting.index == 2 else "finished"
        more = {"message": "out of memory"} if result is None else {}
        return write_run(tmp_path / f"{setting.index}-{seed}", records, status=status, **more)

    return [[Trial(each, seed, written(each, seed)) for seed in (0, 1)] for each in settings]


def test_settings_stand_from_best_to_worst_and_failures_are_named(trials, tmp_path):
    rows = make_rows(trials[::-1], {2: 4})
    states = [(row.state, row.num_finished, row.bits_per_byte) for row in rows]
    assert states == [
        ("finished", 2, pytest.approx(1.3)),
        ("finished", 2, 1.5),
        ("1 of 2 failed", 1, 1.0),  # one seed is no fair mean: it does not lead
        ("given up at step 4", 0, 8.5),
    ]
    assert rows[0].standard_error == pytest.approx(0.1)  # of 1.2 and 1.4: 0.1414 / sqrt(2)
    assert (rows[0].tokens, rows[0].seconds) == (256, pytest.approx(0.1))
    table = describe(rows)
    assert f"| `{rows[0].setting}` | 2 of 2 | 1.3000 | 0.1000 | 256 | 0.1 | finished |" in table
    assert "- `trials/3-1`, step 4: out of memory" in table
    write_results(rows, tmp_path)
    assert (tmp_path / "results.md").read_text() == table + "\n"
    saved = json.loads((tmp_path / "results.json").read_text())
    assert [row["bits_per_byte"] for row in saved] == [row.bits_per_byte for row in rows]
    assert saved[0]["values"] == dict(rows[0].values)
    assert saved[2]["trials"][1]["message"] == "out of memory"


def test_what_has_not_begun_has_no_figures(settings_of, tmp_path):
    (setting,) = settings_of((0.01,))
    (row,) = make_rows([[Trial(setting, 0, tmp_path / "none")]], {})
    assert (row.state, row.bits_per_byte, row.standard_error) == ("not begun", None, None)


def test_the_standard_error_needs_two_values():
    assert standard_error([1.0]) is None
    assert standard_error([1.0, 2.0, 3.0]) == pytest.approx(1 / math.sqrt(3))
