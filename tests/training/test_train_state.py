"""What a run remembers between steps."""

import json
import math

from runs import final_weights

import lumi.training.trainer
from lumi.checkpoint.checkpoint import open_checkpoint
from lumi.training.loss_scale import LossScale
from lumi.training.loss_spikes import LossSpikes
from lumi.training.train_state import SavedLoss, StepOutcome, TrainState


def test_float16_resumes_with_its_loss_scale(start, monkeypatch):
    monkeypatch.setattr(lumi.training.trainer, "LossScale", lambda dtype: LossScale(dtype, patience=3))
    folder = start(dtype="float16", keep_last=9)
    last = folder / "checkpoints" / "step-00000012"
    straight = open_checkpoint(last).state["loss_scale"]
    assert straight["value"] > 2.0**15
    weights = final_weights(folder)
    start(dtype="float16", keep_last=9, resume=str(folder / "checkpoints" / "step-00000008"))
    assert open_checkpoint(last).state["loss_scale"] == straight
    assert final_weights(folder) == weights


def outcome(step, loss=2.0, accepted=True):
    return StepOutcome(
        step=step, loss=loss, gradient_norm=1.0, lr=0.1, num_targets=9, micro_losses=(), accepted=accepted
    )


def test_it_survives_json():
    """Every field comes back, and the next steps are the same."""
    state = TrainState(loss_scale=LossScale("float16", patience=2), spikes=LossSpikes(3.0, window=2))
    for step, accepted in enumerate([True, False, True, False, False], start=1):
        state.end_step(outcome(step, loss=4.0 - step / 4, accepted=accepted))
    state.end_validation(1.5)
    state.note_best(saved_step=5)
    state.validation_due = True
    again = TrainState(loss_scale=LossScale("float16", patience=2), spikes=LossSpikes(3.0, window=2))
    again.load_json(json.loads(json.dumps(state.to_json())))
    assert again.to_json() == state.to_json()
    assert (again.step, again.skipped_steps, again.skipped_in_a_row) == (5, 3, 2)
    assert again.best == SavedLoss(5, 1.5)
    assert again.spikes.limit == state.spikes.limit < math.inf


def test_what_the_next_step_depends_on():
    make = lambda dtype="bfloat16", sigmas=None: TrainState(
        loss_scale=LossScale(dtype), spikes=LossSpikes(sigmas)
    )
    assert not make().needs_outcome(2)
    assert make("float16").needs_outcome(2)
    assert make(sigmas=4.0).needs_outcome(2)
    assert make().needs_outcome(1)  # every skipped step ends the run
    state = make()
    state.end_step(outcome(1, accepted=False))
    assert state.needs_outcome(2)
    state.end_step(outcome(2))
    assert not state.needs_outcome(2)


def test_best_is_a_saved_step():
    state = TrainState(loss_scale=LossScale("float32"), spikes=LossSpikes(None))
    for step, loss, saved in ((1, 3.0, 1), (2, 1.0, 1), (3, 2.0, 3), (4, 2.5, 4)):
        state.end_step(outcome(step))
        state.end_validation(loss)
        state.note_best(saved)
    assert state.best == SavedLoss(3, 2.0)  # step 2 was lower, but nobody saved it


def test_a_validation_that_is_not_finite_or_was_cut_short_is_none():
    state = TrainState(loss_scale=LossScale("float32"), spikes=LossSpikes(None), validation_due=True)
    state.end_validation(math.nan)
    assert (state.validation, state.validation_due) == (None, False)
    state.end_validation(None)
    assert state.validation_due


def test_a_float32_run_does_not_take_over_a_loss_scale():
    state = TrainState(loss_scale=LossScale("float32"), spikes=LossSpikes(None))
    half = TrainState(loss_scale=LossScale("float16"), spikes=LossSpikes(None))
    state.load_json(half.to_json())
    assert state.loss_scale.value == 1.0
