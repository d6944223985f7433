"""Steps whose outcome the host reads one step late, as it does with a GPU: the same run as ever."""

import itertools
import json
import signal

import pytest
import torch
from runs import final_weights, losses

import lumi.model.transformer
import lumi.training.trainer
from lumi.checkpoint.checkpoint import list_checkpoints, open_checkpoint, step_of
from lumi.config import UserError
from lumi.data.batches import Batches
from lumi.training.loss_spikes import LossSpikes
from lumi.training.metrics import read_metrics
from lumi.training.pending_outcome import PendingOutcome, Reading
from lumi.training.train_state import TrainState

TIMES = {"tokens_per_second", "step_seconds", "data_wait_seconds", "stall_seconds"}
NAN = float("nan")


@pytest.fixture
def late(monkeypatch):
    """Runs read their outcomes late from now on."""
    return lambda: monkeypatch.setattr(lumi.training.trainer, "runs_behind", lambda device: True)


@pytest.fixture
def spoil(monkeypatch):
    """Multiply the training loss of steps of four micro-batches, from `first` on, by factors."""
    real = lumi.model.transformer.Transformer.forward

    def spoil(factors, first=1):
        micro_batches = itertools.count(4 * first)

        def forward(self, *arguments):
            loss = real(self, *arguments)
            step = next(micro_batches) // 4 if torch.is_grad_enabled() else 0
            return loss * factors.get(step, 1.0)

        monkeypatch.setattr(lumi.model.transformer.Transformer, "forward", forward)

    return spoil


def content(folder):
    """Everything that a run leaves but times."""
    records = read_metrics(folder / "metrics.jsonl")
    last = open_checkpoint(list_checkpoints(folder / "checkpoints")[-1])
    kept = [{key: value for key, value in record.items() if key not in TIMES} for record in records]
    return kept, last.state, last.records, final_weights(folder)


CASES = {
    "muon": ({6: NAN, 7: float("inf")}, {}),
    "adamw": ({3: NAN}, {"optimizer": {"kind": "adamw"}}),
    "spikes": ({7: 3.0, 10: 3.0}, {"max_loss_sigmas": 4.0}),
    "float16": ({3: NAN}, {"dtype": "float16"}),
    "the reference": ({3: NAN}, {"kernels": "reference", "optimizer": {"max_grad_norm": 0.1}}),
}


@pytest.mark.parametrize("case", CASES)
def test_late_reading_changes_nothing(case, start, spoil, late, monkeypatch, capsys):
    """Skipped steps, a validation at step 3, a resume from step 4."""
    factors, changes = CASES[case]
    changes = {**changes, "validate_every": 3, "keep_last": 9}
    monkeypatch.setattr(lumi.training.trainer, "LossSpikes", lambda sigmas: LossSpikes(sigmas, 5))
    said = lambda: [line for line in capsys.readouterr().out.splitlines() if "skipped: " in line]
    spoil(factors)
    expected = content(start("at once", **changes))
    skipped = said()
    assert len(skipped) == len(factors)
    late()
    spoil(factors)
    folder = start(**changes)
    assert content(folder) == expected
    assert said() == skipped
    spoil(factors, first=5)
    start(**changes, resume=str(folder / "checkpoints" / "step-00000004"))
    assert content(folder) == expected


def test_a_step_is_queued_before_the_one_before_it_is_read(start, late, monkeypatch):
    events = []
    watch = {PendingOutcome: "__init__", TrainState: "end_step"}
    for owner, name in watch.items():
        real = getattr(owner, name)

        def spy(self, *values, real=real, name=name, **named):
            step = named["step"] if name == "__init__" else values[0].step
            events.append(("queued" if name == "__init__" else "read", step))
            return real(self, *values, **named)

        monkeypatch.setattr(owner, name, spy)
    late()
    start(num_steps=5, save_every=3, validate_every=9)
    order = [
        ("queued", 1),
        ("queued", 2),
        ("read", 1),
        ("queued", 3),
        ("read", 2),
        ("read", 3),
    ]  # step 3 saves
    assert events == [*order, ("queued", 4), ("queued", 5), ("read", 4), ("read", 5)]


def test_a_run_that_skips_too_much_ends_with_that_step(start, spoil, late, tmp_path):
    late()
    spoil(dict.fromkeys(range(6, 99), NAN))
    with pytest.raises(UserError, match=r"in 3 steps running, up to step 8; to inspect: .*step-00000008"):
        start(max_skipped_steps=3)
    assert open_checkpoint(tmp_path / "run" / "checkpoints" / "step-00000008").state["skipped_steps"] == 3
    assert len(losses(tmp_path / "run")) == 8


def test_a_fault_of_the_data_leaves_a_whole_log(start, late, monkeypatch, tmp_path):
    late()
    expected = losses(start("whole"))
    real = Batches.rows

    def rows(self, step, *span):
        if step == 7:
            raise UserError("the store", "must be readable")
        return real(self, step, *span)

    monkeypatch.setattr(Batches, "rows", rows)
    with pytest.raises(UserError, match="the store must be readable"):
        start()
    assert losses(tmp_path / "run") == expected[:6]


def test_sigterm_saves_the_step_that_was_pending(start, late, monkeypatch, tmp_path):
    late()
    expected = content(start("whole"))
    mark = lumi.training.trainer.Watchdog.mark

    def terminate(self, step, phase):
        mark(self, step, phase)
        if (step, phase) == (6, "optimizer"):
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(lumi.training.trainer.Watchdog, "mark", terminate)
        folder = start(expect=128 + signal.SIGTERM)
    assert step_of(list_checkpoints(folder / "checkpoints")[-1]) == 6
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")][-2:] == [6, 6]
    assert json.loads((folder / "status.json").read_text())["step"] == 6
    start(resume="auto")
    assert content(folder)[1:] == expected[1:]


@pytest.mark.gpu
def test_a_reading_waits_for_a_gpu_only_when_it_is_read():
    numbers = torch.arange(3, dtype=torch.float64, device="cuda")
    torch.cuda._sleep(1_000_000_000)  # about half a second
    reading = Reading(numbers * 2)
    assert not torch.cuda.current_stream().query(), "it came back only after the device was done"
    numbers.zero_()
    assert reading.read() == [0.0, 2.0, 4.0]
