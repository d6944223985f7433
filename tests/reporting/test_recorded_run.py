from pathlib import Path

import pytest
from written_runs import train_record, write_run

from lumi.config import UserError
from lumi.reporting.recorded_run import read_runs


def test_a_finished_run(tmp_path):
    records = [train_record(step, 5.0 - step) for step in (1, 2, 3)]
    records += [{"step": 3, "kind": "validation", "loss": 2.5}]
    [run] = read_runs([write_run(tmp_path / "a", records, {"num_steps": 3, "lora": {"rank": 4}})])
    assert (run.name, run.status, run.unit, run.kind) == ("a", "finished", "token", "next token, LoRA")
    assert (run.steps, run.planned_steps, run.notes) == (3, 3, ())
    assert (run.figures["loss"], run.figures["best_validation_loss"]) == (2.0, 2.5)


def test_a_run_on_pairs(tmp_path):
    record = {"step": 1, "kind": "train", "loss": 0.7, "pairs": 4, "reward_margin": 0.1}
    [run] = read_runs([write_run(tmp_path / "a", [record], {"num_steps": 1, "dpo": {"beta": 0.1}})])
    assert (run.unit, run.kind) == ("pair", "preference tuning (DPO)")


@pytest.mark.parametrize(
    ("tail", "expected"),
    [
        ('{"step": 2, "ki', "1 line of metrics.jsonl is no record"),
        ('[]\n{"step": "x", "kind": "train"}\n\0\xff\n', "3 lines of metrics.jsonl are no records"),
        ('{"step": -1, "kind": "train"}\n{"step": 1e3, "kind": "train"}\n', "2 lines"),
        ('{"step": 1' + 400 * "0" + ', "kind": "train"}\n', "1 line"),
    ],
)
def test_damaged_lines_are_counted_and_left_out(tail, expected, tmp_path):
    [run] = read_runs([write_run(tmp_path / "a", [train_record(1, 5.0)], tail=tail)])
    assert [record["step"] for record in run.records] == [1]
    assert expected in run.notes[0]


@pytest.mark.parametrize(("tail", "lines"), [("[]\n", "The only line"), ("{\n" * 3, "All 3 lines")])
def test_a_run_whose_lines_are_all_damaged(tail, lines, tmp_path):
    [run] = read_runs([write_run(tmp_path / "a", [], tail=tail)])
    assert run.notes[0].startswith(f"{lines} of metrics.jsonl")
    assert not any("no records yet" in note for note in run.notes)


def test_what_a_reader_must_know(tmp_path):
    def notes(name, records=(), **more):
        return read_runs([write_run(tmp_path / name, list(records), **more)])[0].notes

    one = [train_record(1, 5.0)]
    assert notes("empty") == ("There are no records yet.",)
    assert "in progress, or was killed" in notes("running", one, status="running")[0]
    stopped = notes("stopped", one, status="preempted", signal="SIGTERM")
    assert stopped == ("The run was stopped by SIGTERM. It can go on.",)
    assert "The run failed: too hot." in notes("failed", one, status="failed", message="too hot")
    (tmp_path / "running" / "status.json").write_text("{}")
    (tmp_path / "running" / "config.json").write_text("[1")
    [run] = read_runs([tmp_path / "running"])
    assert (run.status, run.config, run.planned_steps) == ("unknown", None, None)
    assert [note.split(":")[0] for note in run.notes] == ["The status is unknown", "The config is unknown"]
    (tmp_path / "running" / "metrics.jsonl").unlink()
    (tmp_path / "stopped" / "status.json").unlink()
    assert "There are no records yet." in read_runs([tmp_path / "failed", tmp_path / "empty"])[1].notes
    assert read_runs([tmp_path / "stopped"])[0].status == "unknown"


def test_names_tell_runs_apart(tmp_path):
    one = [train_record(1, 5.0)]
    paths = [write_run(tmp_path / top / "run", one) for top in ("a", "b")]
    assert [run.name for run in read_runs(paths)] == [str(path) for path in paths]
    assert [run.name for run in read_runs([paths[0], paths[0] / ".." / "run"])] == ["run"]


def test_what_is_no_run_is_refused(tmp_path):
    run = write_run(tmp_path / "a", [train_record(1, 5.0)])
    with pytest.raises(UserError, match=rf"RUN must be a run folder.* which has none; name its runs: {run}$"):
        read_runs([tmp_path])
    with pytest.raises(UserError, match="which is no folder"):
        read_runs([Path("nowhere")])
    records = run / "metrics.jsonl"
    records.unlink()
    for make in (records.mkdir, lambda: records.symlink_to(records)):
        make()
        with pytest.raises(UserError, match=rf"got {run}, where metrics.jsonl is no file"):
            read_runs([run])
        records.rmdir() if records.is_dir() else records.unlink()
