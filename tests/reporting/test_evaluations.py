import json

import pytest
from written_runs import evaluation_results

from lumi.config import UserError
from lumi.host.provenance import Parent, write_provenance
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


def test_an_evaluation_of_what_was_made_from_a_run_is_found_by_the_records(tmp_path):
    """As the demo has it: a base, an adapter of it, both merged, and the merged model's evaluation."""
    runs = [tmp_path / name for name in ("pretrain", "finetune", "other")]
    base, adapter, merged = runs[0] / "final", runs[1] / "final", tmp_path / "model"
    for folder in (base, adapter, merged, runs[2] / "final"):
        folder.mkdir(parents=True)
    file = write(tmp_path / "evaluation", evaluation_results("/elsewhere/model"))
    write_provenance(adapter, "adapter", [Parent("model", base, "0")], {})
    write_provenance(merged, "model", [Parent("adapter", adapter, "1")], {})
    write_provenance(file, "evaluation", [Parent("model", merged, "2")], {})
    for shown in (runs[:1], runs[1:2], runs):
        [found], notes = find_evaluations(shown, [])
        assert found.runs == tuple(run.name for run in shown if run.name != "other")
        assert (found.title, notes) == ("/elsewhere/model", [])
    assert find_evaluations(runs[2:], []) == ([], [])
    (adapter / "provenance.json").write_text("{")
    assert find_evaluations(runs[:1], []) == ([], [])
    assert len(find_evaluations(runs[1:2], [])[0]) == 1


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
