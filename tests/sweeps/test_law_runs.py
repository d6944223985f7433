import pytest

from lumi.config import UserError, write_json
from lumi.sweeps.law_runs import best_of_each, find_runs, points_of


def test_what_a_run_counts_as(finished_run):
    path, num_parameters = finished_run("run", 32, 10, 2.5)
    (run,), num_unfinished = find_runs([path])
    assert (run.num_parameters, run.tokens, run.bits_per_byte) == (num_parameters, 40960, 2.5)
    assert num_unfinished == 0
    # 2 layers, vocabulary 384: a product for each weight but the looked-up embedding, and attention over 32
    products = num_parameters - 384 * 32
    assert run.flops == (6 * products + 2 * 6 * 32 * 32) * 40960
    assert [column.tolist() for column in points_of([run])] == [[num_parameters], [40960], [2.5]]


def test_of_a_sweep_the_finished_trials_count(finished_run, tmp_path):
    trials = tmp_path / "sweep" / "trials"
    finished_run("0", 32, 10, 2.5, folder=trials)
    path, _ = finished_run("1", 32, 20, 2.4, folder=trials)
    write_json(path / "status.json", {"status": "preempted", "step": 5})
    write_json(tmp_path / "sweep" / "sweep.json", {})
    runs, num_unfinished = find_runs([tmp_path / "sweep"])
    assert ([run.path.name for run in runs], num_unfinished) == (["0"], 1)


def test_the_best_setting_of_each_size_counts_with_all_its_seeds(finished_run):
    rates = {0.1: (3.0, 2.0), 0.2: (2.6, 2.2)}  # the second has the lower mean
    paths = [
        finished_run(f"{rate}-{seed}", 32, 10, bits, seed=seed, optimizer={"peak_lr": rate})[0]
        for rate, losses in rates.items()
        for seed, bits in enumerate(losses)
    ]
    longer, _ = finished_run("longer", 32, 20, 9.0)
    runs = best_of_each(find_runs([*paths, longer])[0])
    assert [run.path.name for run in runs] == ["0.2-0", "0.2-1", "longer"]


def test_runs_that_cannot_be_used_are_named(finished_run, tmp_path):
    good, _ = finished_run("good", 32, 10, 2.5)
    other, _ = finished_run("other", 32, 20, 2.5, held_out_bytes=5)
    with pytest.raises(
        UserError, match=r"other: must be measured on the 999 held-out bytes of .*good, got 5"
    ):
        find_runs([good, other])
    bare, _ = finished_run("bare", 32, 20, None)
    with pytest.raises(UserError, match=r"bare: must have bits per byte in its last validation, got none"):
        find_runs([bare])
    tuned, _ = finished_run("tuned", 32, 20, 2.5, lora={"rank": 2})
    with pytest.raises(UserError, match=r"tuned: must be a pre-training, without lora and dpo"):
        find_runs([tuned])
    write_json(other / "status.json", {"status": "failed", "step": 5})
    with pytest.raises(UserError, match=r"other: must be a finished run, got failed; let it go on"):
        find_runs([good, other])
    with pytest.raises(UserError, match=r"RUN must be a run folder"):
        find_runs([tmp_path / "none"])
