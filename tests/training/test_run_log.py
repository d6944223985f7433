"""The log of a run: its records, and what becomes of a disk that is full."""

import errno

import pytest
import torch

from lumi.config import UserError
from lumi.training.metrics import read_metrics
from lumi.training.run_folder import RunFolder
from lumi.training.run_log import RunLog
from lumi.training.train_state import StepOutcome


def outcome(step, accepted=True):
    losses = [torch.tensor(1.0)]
    return StepOutcome(
        step=step, loss=2.5, gradient_norm=0.5, lr=0.1, num_targets=9, micro_losses=losses, accepted=accepted
    )


@pytest.fixture
def log(tmp_path):
    log = RunLog(RunFolder(tmp_path), is_main=True)
    log.begin(0)
    with log.progress(0, 3):
        yield log


def test_the_record_of_a_step(log, tmp_path):
    log.step(outcome(1), skipped_steps=0, mix=None, tokens=64, flops_share=None)
    log.step(outcome(2, accepted=False), skipped_steps=1, mix=[0.75, 0.25], tokens=64, flops_share=1e-9)
    first, second = read_metrics(tmp_path / "metrics.jsonl")
    expected = {"step": 1, "kind": "train", "loss": 2.5, "gradient_norm": 0.5, "lr": 0.1, "targets": 9}
    assert expected.items() <= first.items()
    assert (first["tokens"], second["tokens"]) == (64, 128)
    assert first.keys() == expected.keys() | {
        *("skipped", "tokens_per_second", "step_seconds", "data_wait_seconds", "tokens")
    }
    assert second.keys() == first.keys() | {"skipped_steps", "mix", "mfu"}
    assert (first["skipped"], second["skipped"], second["skipped_steps"]) == (False, True, 1)
    assert second["mfu"] == pytest.approx(1e-9 * second["tokens_per_second"], rel=0.01)


def test_a_full_disk_ends_no_step_but_is_not_forgotten(log, monkeypatch):
    log.check()

    def full(*values, **named):
        raise UserError("metrics.jsonl cannot be written")

    monkeypatch.setattr(log.metrics, "write", full)
    log.step(outcome(1), skipped_steps=0, mix=None, tokens=64, flops_share=None)
    monkeypatch.undo()
    log.write(1, "checkpoint", stall_seconds=0.1)
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be written"):
        log.check()


def test_other_processes_say_nothing(tmp_path, capsys):
    log = RunLog(RunFolder(tmp_path), is_main=False)
    with log.progress(0, 1):
        log.step(outcome(1), skipped_steps=0, mix=None, tokens=64, flops_share=None)
        log.say("a line")
        log.draw()
    log.check()
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_an_error_of_the_disk_is_kept_too(log, monkeypatch):
    def full(*values, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("lumi.training.run_log.draw_loss", full)
    log.draw()
    with pytest.raises(OSError, match="No space left"):
        log.check()
