"""Validation within a run."""

import dataclasses
import math
import signal

from runs import final_weights

import lumi.training.objective
from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.training.metrics import read_metrics


def test_the_best_is_known_though_a_signal_cut_its_validation(start, monkeypatch):
    """The validation of step 4, at which a checkpoint is saved, is done over when the run goes on; it is the
    lowest."""
    real, signals = lumi.training.objective.held_out_loss, iter([False] * 3 + [True])
    scripted = iter([1.0, 2.0, 3.0] * 2)

    def held_out_loss(*arguments):
        if next(signals, False):
            signal.raise_signal(signal.SIGTERM)
        result = real(*arguments)
        return result and dataclasses.replace(result, loss=next(scripted))

    monkeypatch.setattr(lumi.training.objective, "held_out_loss", held_out_loss)
    whole = start("whole", final="best")
    start("cut", final="best", expect=128 + signal.SIGTERM)
    cut = start("cut", final="best", resume="auto")
    best = [
        open_checkpoint(folder / "checkpoints" / "step-00000012").state["best"] for folder in (whole, cut)
    ]
    assert best == [{"step": 4, "loss": 1.0}] * 2
    assert final_weights(cut) == final_weights(whole)


def test_a_validation_loss_that_is_not_finite_ends_nothing(start, monkeypatch):
    real = lumi.training.objective.held_out_loss
    monkeypatch.setattr(
        lumi.training.objective,
        "held_out_loss",
        lambda *arguments: dataclasses.replace(real(*arguments), loss=math.nan),
    )
    folder = start()
    records = [record for record in read_metrics(folder / "metrics.jsonl") if record["kind"] == "validation"]
    assert [record["loss"] for record in records] == [None] * 3
    assert open_checkpoint(folder / "checkpoints" / "step-00000012").state["best"] is None
