from written_runs import train_record, write_run

from lumi.sweeps.trial import Trial


def validation(step, bits):
    return {"step": step, "kind": "validation", "loss": 1.0, "bits_per_byte": bits}


def progress_of(folder):
    return Trial(None, 0, folder).progress()


def test_how_far_a_trial_is_stands_in_its_folder(tmp_path):
    assert progress_of(tmp_path / "none").status == "new"
    records = [train_record(1, 2.0), validation(1, 3.0), train_record(2, 1.0), validation(2, 2.5)]
    done = progress_of(write_run(tmp_path / "done", records))
    assert (done.status, done.step, done.tokens, done.result) == ("finished", 2, 128, 2.5)
    assert done.validations == {1: 3.0, 2: 2.5}
    assert done.seconds == 0.2
    for status in ("running", "preempted"):
        begun = progress_of(write_run(tmp_path / status, records, status=status, tail='{"step": 3, "ki'))
        assert (begun.status, begun.result) == ("begun", None)


def test_a_run_that_came_to_no_number_has_failed(tmp_path):
    failed = progress_of(write_run(tmp_path / "failed", [], status="failed", message="too many steps"))
    assert (failed.status, failed.message, failed.result) == ("failed", "too many steps", None)
    records = [train_record(1, 2.0), validation(1, None)]
    infinite = progress_of(write_run(tmp_path / "infinite", records))
    assert (infinite.status, infinite.message) == ("failed", "its held-out loss is not a number")
