import json

import pytest
from written_runs import evaluation_results

from lumi.config import UserError
from lumi.reporting.evaluations import find_evaluations


def write(folder, results):
    folder.mkdir(parents=True)
    (folder / "evaluation_results.json").write_text(json.dumps(results))
    return folder


def test_evaluations_are_found_in_a_run_beside_it_and_where_they_are_named(tmp_path):
    run = tmp_path / "run"
    inside = write(run / "evaluation", evaluation_results(run))
    beside = write(tmp_path / "of_run", evaluation_results(run / "final"))
    adapter = write(tmp_path / "of_adapter", evaluation_results("base") | {"adapter": str(run / "final")})
    write(tmp_path / "of_another", evaluation_results(tmp_path / "run2"))
    (tmp_path / "odd").mkdir()
    (tmp_path / "odd" / "evaluation_results.json").write_text("[]")
    elsewhere = write(tmp_path / "x" / "given", evaluation_results("hub/model"))
    found, notes = find_evaluations([run], [elsewhere, inside])
    assert {e.path.parent for e in found} == {elsewhere, inside, adapter, beside}
    assert len(found) == 4
    assert notes == []
    bits = [f for f in found[0].figures if f.metric == "bits per byte"]
    assert bits[0].value == "1.25"
    assert found[0].answers == (("Who?", "<b>me</b>", "any_of"),)
    assert (
        next(e for e in found if e.path.parent == adapter).title == f"base with the adapter {run / 'final'}"
    )


def test_what_cannot_be_shown_is_said(tmp_path):
    broken = write(tmp_path / "a", {"model": "m"})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "evaluation_results.json").write_text("{")
    found, notes = find_evaluations([], [broken, tmp_path / "b"])
    assert found == []
    assert "is not as this version of Lumi writes it (KeyError: 'adapter')" in notes[0]
    assert "not valid JSON" in notes[1]
    with pytest.raises(UserError, match=r"--evaluations must be folders with evaluation_results\.json, got "):
        find_evaluations([], [tmp_path])
