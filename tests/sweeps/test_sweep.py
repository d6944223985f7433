import json
import os
import signal
import threading
import time

import pytest
import trial_processes
from runs import CONFIG, final_weights, losses

from lumi.config import UserError
from lumi.host.locks import lock_file
from lumi.sweeps.sweep import sweep

RATES = (0.0001, 0.001, 0.01, 1e9)


@pytest.fixture
def swept(store_dir, tokenizer_dir, tmp_path, capsys):
    """Calls a sweep; returns its exit code, its rows and what it printed."""

    def swept(file, folder="out", processes=2):
        output = tmp_path / folder
        code = sweep(file, [str(store_dir)], str(tokenizer_dir), output, processes=processes, device="cpu")
        return code, json.loads((output / "results.json").read_text()), capsys.readouterr().out

    return swept


def rates(rows):
    return [row["values"]["optimizer.peak_lr"] for row in rows]


@pytest.mark.usefixtures("pretending")
class TestOfTrialsThatPretend:
    def test_a_rung_keeps_the_best_and_the_table_names_what_failed(self, sweep_file, swept, tmp_path):
        file = sweep_file(RATES, seeds=[0, 1], halving={"rungs": [4], "keep": 0.5})
        code, rows, printed = swept(file, "waits")
        assert code == 0
        assert rates(rows)[:2] == [0.01, 0.001]
        assert [row["state"] for row in rows] == [
            *("finished", "finished"),
            *("given up at step 4", "2 of 2 failed"),
        ]
        assert rows[0]["bits_per_byte"] == pytest.approx(1 + 0.005 + 1 / trial_processes.STEPS)
        assert printed.startswith("4 settings x 2 seeds, 2 at a time\n")
        assert "step 4: 2 of 4 settings go on" in printed
        assert rows[2]["bits_per_byte"] == pytest.approx(1 + 2 + 0.005 + 1 / 4)  # at its rung
        assert (tmp_path / "waits" / "results.png").is_file()
        assert json.loads((tmp_path / "waits" / "base.json").read_text()) == CONFIG
        again, same, _ = swept(file, "waits")
        assert (again, same) == (0, rows)
        folders = (tmp_path / "waits" / "trials").iterdir()
        assert all(trial_processes.starts(folder) <= 2 for folder in folders)  # none was begun again

    def test_the_best_setting_of_each_contender_gets_the_other_seeds(self, sweep_file, swept):
        grids = {"a": {"optimizer.peak_lr": [0.1, 0.01]}, "b": {"optimizer.peak_lr": [0.0001, 0.001, 1e9]}}
        file = sweep_file(seeds=[0, 1, 2], search={"kind": "contenders", "grids": grids})
        code, rows, printed = swept(file)
        assert code == 0
        plan = "5 settings of 2 contenders x 1 seed, then the best of each x 2 more, 2 at a time"
        assert printed.startswith(plan)
        assert [(row["contender"], len(row["trials"])) for row in rows] == [
            *(("a", 3), ("b", 3), ("a", 1), ("b", 1), ("b", 1))
        ]
        assert rates(rows) == [0.01, 0.001, 0.1, 0.0001, 1e9]
        assert rows[0]["setting"] == "a: optimizer.peak_lr=0.01"
        assert rows[0]["bits_per_byte"] == pytest.approx(1 + 0.01 + 1 / trial_processes.STEPS)
        assert swept(file)[1] == rows

    def test_a_higher_budget_goes_on_and_another_sweep_is_refused(self, sweep_file, swept, tmp_path):
        assert swept(sweep_file(RATES[:3], budget={"trials": 1}))[0] == 0
        _, rows, _ = swept(sweep_file(RATES[:3], budget={"trials": 3}))
        assert sorted(rates(rows)) == list(RATES[:3])
        (first,) = (tmp_path / "out" / "trials").glob("000-*")
        assert trial_processes.starts(first) == 1
        with pytest.raises(UserError, match=r"out: must be of the same sweep, got other arguments \(.*seeds"):
            swept(sweep_file(RATES[:3], seeds=[5]))

    def test_ctrl_c_leaves_a_folder_that_goes_on(self, sweep_file, swept, tmp_path):
        file = sweep_file((1e11,))

        def interrupt():
            while not list(tmp_path.glob("out/trials/*/status.json")):
                time.sleep(0.02)
            os.kill(os.getpid(), signal.SIGINT)

        threading.Thread(target=interrupt).start()
        code, rows, printed = swept(file)
        assert (code, rows[0]["state"]) == (130, "not begun")
        assert printed.endswith("stopped by SIGINT; the same command goes on\n")
        trial = next((tmp_path / "out" / "trials").iterdir())
        assert json.loads((trial / "status.json").read_text())["status"] == "preempted"

    def test_the_minutes_end_a_call(self, sweep_file, swept):
        code, rows, printed = swept(sweep_file((1e11,), budget={"minutes": 0.01}))
        assert (code, rows[0]["state"]) == (0, "not begun")
        assert "the 0.01 minutes are over; the same command goes on" in printed

    def test_where_all_trials_fail_the_exit_code_says_so(self, sweep_file, swept):
        code, _, printed = swept(sweep_file((1e9,)))
        assert code == 1
        assert printed.startswith("1 setting x 1 seed, 1 at a time\n")
        assert "step 0: the loss was not finite" in printed


def test_what_cannot_work_is_refused_before_the_work(sweep_file, swept, tmp_path, corpus_dir, tokenizer_dir):
    file = sweep_file()
    with pytest.raises(UserError, match=r"--processes must be at least 1, got 0"):
        swept(file, processes=0)
    with pytest.raises(UserError, match=r"sweep.json: search: optimizer.peak_lr=-1"):
        swept(sweep_file((-1,)))
    with pytest.raises(
        UserError, match=r"model.vocab_size must be at least the tokenizer's 384 pieces, got 9"
    ):
        swept(sweep_file(base={"model": {"vocab_size": 9}}))
    with pytest.raises(UserError, match=r"--data-dirs must name token stores"):
        sweep(sweep_file(), [str(tmp_path)], str(tokenizer_dir), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"--output-dir must be new, or a sweep's, got .*other, which holds"):
        swept(sweep_file(), folder="other")


def test_two_sweeps_do_not_work_in_one_folder(sweep_file, swept, tmp_path, monkeypatch):
    def held(path, *_):
        raise BlockingIOError(11, "host h, pid 1")

    monkeypatch.setattr("lumi.sweeps.sweep.lock_file", held)
    assert lock_file is not held
    with pytest.raises(UserError, match=r"that no sweep is at work in, got .*out, which host h, pid 1 is"):
        swept(sweep_file())


def test_a_real_training(sweep_file, swept, tmp_path):
    code, (row,), _ = swept(sweep_file((0.02,), base={"num_steps": 4}), processes=1)
    assert (code, row["state"]) == (0, "finished")
    folder = tmp_path / "out" / row["trials"][0]["folder"]
    assert json.loads((folder / "config.json").read_text())["optimizer"]["peak_lr"] == 0.02
    assert (folder / "final" / "model.safetensors").is_file()
    assert row["tokens"] == 4 * CONFIG["batches"]["batch_tokens"]
    log = (folder / "train.log").read_text()
    assert log.startswith(f"train.py --config {tmp_path / 'out' / 'base.json'} --data-dirs ")
    assert f"{row['bits_per_byte']:.4f} bits/byte" in log
    before = (folder / "metrics.jsonl").read_bytes()
    assert swept(sweep_file((0.02,), base={"num_steps": 4}))[1] == [row]
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_after_ctrl_c_a_trial_goes_on_from_where_it_was_saved(sweep_file, swept, tmp_path, monkeypatch):
    """And ends as if nothing had come between, bit for bit."""
    monkeypatch.setattr("lumi.sweeps.trial_runner.POLL_SECONDS", 0.02)
    file = sweep_file((0.02,), base={"num_steps": 100, "validate_every": 50, "save_every": 50})

    def interrupt():
        while not any(metrics.stat().st_size for metrics in tmp_path.glob("cut/trials/*/metrics.jsonl")):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=interrupt).start()
    code, (row,), printed = swept(file, "cut")
    assert (code, row["state"]) == (130, "in progress")
    saved = row["trials"][0]["step"]
    assert 0 < saved < 100
    assert f"saved at step {saved}\n" in printed
    (code, (cut,), _), (_, (whole,), _) = swept(file, "cut"), swept(file, "whole")
    assert (code, cut["bits_per_byte"], cut["tokens"]) == (0, whole["bits_per_byte"], whole["tokens"])
    cut_run, whole_run = (next((tmp_path / name / "trials").iterdir()) for name in ("cut", "whole"))
    assert losses(cut_run) == losses(whole_run)
    assert final_weights(cut_run) == final_weights(whole_run)
    assert f"step-{saved:08d} at step {saved}\n" in (cut_run / "train.log").read_text()  # resumed
