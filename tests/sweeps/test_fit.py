import json

import numpy as np
import pytest

from lumi.config import UserError
from lumi.sweeps.fit import fit


@pytest.fixture
def ladder(finished_run):
    """Nine runs of the law 0.5 + 10 / N^0.3 + 40 / D^0.25, with noise."""
    generator, paths = np.random.default_rng(0), []
    for dim in (32, 64, 128):
        for steps in (10, 100, 1000):
            _, size = finished_run(f"probe-{dim}-{steps}", dim, steps, 1.0)
            bits = 0.5 + 10 / size**0.3 + 40 / (4096 * steps) ** 0.25
            bits *= float(np.exp(generator.normal(0, 1e-3)))
            paths.append(finished_run(f"{dim}-{steps}", dim, steps, bits)[0])
    return paths


def test_it_prints_and_writes_the_law(ladder, tmp_path, capsys):
    assert fit(ladder, tmp_path / "fit", [1e12]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("loss = E + A / N^a + B / D^b, fitted to 9 runs\n")
    saved = json.loads((tmp_path / "fit" / "fit.json").read_text())
    for name, truth in {"E": 0.5, "a": 0.3, "b": 0.25, "A": 10, "B": 40}.items():
        low, high = saved["numbers"][name]["interval"]
        assert low < truth < high, name
        assert f"  {name}  {saved['numbers'][name]['value']:.4g} [{low:.4g}, {high:.4g}]" in printed
    (budget,) = saved["budgets"]
    spent = saved["flops_per_parameter_and_token"] * budget["parameters"]["value"] * budget["tokens"]["value"]
    assert spent == pytest.approx(1e12)
    assert len(saved["runs"]) == 9
    assert (tmp_path / "fit" / "fit.png").read_bytes().startswith(b"\x89PNG")


def test_without_budgets_multiples_of_the_largest_run_are_taken(ladder, tmp_path, capsys):
    fit(ladder, tmp_path / "fit")
    saved = json.loads((tmp_path / "fit" / "fit.json").read_text())
    largest = max(run["flops"] for run in saved["runs"])
    assert [budget["flops"] for budget in saved["budgets"]] == [largest, 10 * largest, 100 * largest]
    assert "(100 times the largest run)" in capsys.readouterr().out


def test_what_cannot_be_fitted_is_refused_and_nothing_is_written(ladder, tmp_path):
    with pytest.raises(UserError, match=r"--flops must be above 0, got -1"):
        fit(ladder, tmp_path / "fit", [-1.0])
    with pytest.raises(UserError, match=r"RUN must name finished runs of at least 5 different pairs"):
        fit(ladder[:4], tmp_path / "fit")
    assert not (tmp_path / "fit").exists()
