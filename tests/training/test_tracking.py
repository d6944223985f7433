"""The way to the trackers: in order, without delay, and what becomes of one that fails."""

import importlib.util
import threading
import time

import pytest

from lumi.config import UserError
from lumi.training import tracking
from lumi.training.metrics import read_metrics
from lumi.training.trackers import TrackedRun
from lumi.training.tracking import Tracking

RECORD = {"step": 1, "kind": "train", "loss": 2.5}


class Listening:
    """Keeps what it hears. `held`: the last step that it has."""

    held = 0

    def __init__(self):
        self.heard, self.finished = [], None
        seen.append(self)

    def begin(self, run):
        return self.held

    def record(self, step, scalars):
        self.heard.append((step, dict(scalars)))

    def finish(self, step, figures, picture):
        self.finished = (step, figures, picture)


class Holding(Listening):
    held = 6


class Failing(Listening):
    def record(self, step, scalars):
        raise ConnectionError("https://me:hunter2@host/?write_token=abc123&x=1 refused secret-of-mine\nmore")


class Hanging(Listening):
    def record(self, step, scalars):
        hanging.wait(60)


seen, hanging = [], threading.Event()


@pytest.fixture
def follow(tmp_path, monkeypatch):
    """Track a run by classes; returns the Tracking and the lines that it says."""
    seen.clear()
    hanging.clear()

    def follow(*classes, resume_step=0, earlier=()):
        names = [kind.__name__ for kind in classes]
        monkeypatch.setattr(tracking, "TRACKERS", dict(zip(names, classes, strict=True)))
        run, said = TrackedRun(folder=tmp_path, id="a", config={}, resume_step=resume_step), []
        return Tracking(names, run, said.append, earlier), said

    yield follow
    hanging.set()


def test_records_come_in_order_and_the_figures_last(follow, tmp_path):
    tracked, said = follow(Listening, Listening)
    for step in range(1, 200):
        tracked.record(RECORD | {"step": step})
    tracked.finish(199, {"loss": 2.5}, tmp_path / "loss.png")
    for tracker in seen:
        assert tracker.heard == [(step, {"train/loss": 2.5}) for step in range(1, 200)]
        assert tracker.finished == (199, {"loss": 2.5}, tmp_path / "loss.png")
    assert said == []


def test_steps_that_are_done_again_are_not_doubled(follow, tmp_path):
    """The run goes on from step 4, and the tracker has its records to step 6 and keeps them."""
    tracked, _ = follow(Holding, resume_step=4)
    for step in (4, 5, 6, 7):  # 4: a validation that a signal had cut short
        tracked.record(RECORD | {"step": step})
    tracked.finish(7, {}, tmp_path)
    assert [step for step, _ in seen[0].heard] == [4, 7]


def test_one_that_lacks_earlier_records_gets_them(follow, tmp_path):
    """Both go on from step 8. One has the records to step 6, the other none."""
    earlier = [RECORD | {"step": step} for step in range(1, 9)]
    tracked, _ = follow(Holding, Listening, resume_step=8, earlier=earlier)
    tracked.record(RECORD | {"step": 9})
    tracked.finish(9, {}, tmp_path)
    heard = {type(tracker): [step for step, _ in tracker.heard] for tracker in seen}
    assert heard == {Holding: [7, 8, 9], Listening: list(range(1, 10))}


def test_one_that_fails_is_named_once_and_left_out(follow, tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_API_KEY", "secret-of-mine")
    tracked, said = follow(Failing, Listening)
    for step in range(1, 50):
        tracked.record(RECORD | {"step": step})
    tracked.finish(49, {}, tmp_path)
    assert len(seen[1].heard) == 49
    assert seen[0].finished is None
    assert said == [
        "warning: tracker Failing: ConnectionError: https://***@host/?write_token=***&x=1 refused ***; "
        "the run goes on without it, and metrics.jsonl has everything"
    ]


def test_one_that_hangs_delays_nothing(follow, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "QUEUE_RECORDS", 10)
    tracked, said = follow(Hanging, Listening)
    start = time.monotonic()
    for step in range(1, 40):
        tracked.record(RECORD | {"step": step})
        time.sleep(0.002)
    tracked.finish(39, {}, tmp_path)
    assert time.monotonic() - start < 20
    assert [line.split(";")[0] for line in said] == ["warning: tracker Hanging: it is 10 records behind"]


def test_the_end_waits_for_none_for_long(follow, tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "FINISH_SECONDS", 0.0)
    tracked, said = follow(Hanging)
    tracked.record(RECORD)
    tracked.finish(1, {}, tmp_path)
    assert [line.split(";")[0] for line in said] == [
        "warning: tracker Hanging: it was not done 0 s after the end"
    ]


def test_a_training_with_trackers(start, follow, monkeypatch, capsys):
    """Every record of `metrics.jsonl` reaches the one that listens; one that fails changes nothing."""
    monkeypatch.setattr(tracking, "TRACKERS", {"tensorboard": Listening, "wandb": Failing})
    monkeypatch.setattr("lumi.training.resolved_run.check_installed", lambda names: None)
    folder = start(trackers=["tensorboard", "wandb"])
    records = read_metrics(folder / "metrics.jsonl")
    heard = seen[0].heard
    assert [step for step, _ in heard] == [record["step"] for record in records]
    losses = [
        scalars[f"{r['kind']}/loss"] for (_, scalars), r in zip(heard, records, strict=True) if "loss" in r
    ]
    assert losses == [record["loss"] for record in records if "loss" in record]
    step, figures, picture = seen[0].finished
    assert (step, picture) == (12, folder / "loss.png")
    assert figures["loss"] == next(r["loss"] for r in reversed(records) if r["kind"] == "train")
    assert capsys.readouterr().out.count("warning: tracker wandb: ConnectionError") == 1


def test_a_missing_tracker_is_refused_before_the_work(start, tmp_path, monkeypatch):
    def find_spec(name, find=importlib.util.find_spec):
        return None if name == "trackio" else find(name)

    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    with pytest.raises(UserError, match=r'trackers must be installed, got "trackio"'):
        start(trackers=["trackio"])
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
