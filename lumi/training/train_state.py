"""What a run remembers between steps. Every checkpoint holds it; a resumed run goes on exactly from it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

from lumi.training.loss_scale import LossScale
from lumi.training.loss_spikes import LossSpikes


@dataclass(frozen=True)
class SavedLoss:
    """A step and its validation loss, in nats per token, or per pair."""

    step: int
    loss: float


@dataclass(frozen=True, kw_only=True)
class StepOutcome:
    """What became of one step.

    Attributes:
        loss: mean over the targets of all processes, in nats per token; or over the pairs.
        gradient_norm: L2 norm of all gradients before clipping.
        lr: the step's learning rate.
        num_targets: of all processes; or pairs.
        micro_losses: this process's losses, one a micro-batch, each the sum over its targets.
        accepted: whether the weights were updated.
        measures: other means, by name.
    """

    step: int
    loss: float
    gradient_norm: float
    lr: float
    num_targets: int
    micro_losses: Sequence[float]
    accepted: bool
    measures: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_finite(self) -> bool:
        """Whether loss and gradients are numbers. A finite step that was not accepted is a spike."""
        return isfinite(self.loss) and isfinite(self.gradient_norm)


@dataclass(kw_only=True)
class TrainState:
    """The state after `step` steps.

    Attributes:
        skipped_steps: steps that did not update the weights, in the whole run; `skipped_in_a_row`: up to now.
        best: the saved step of the lowest validation loss; None: no saved step was validated.
        validation: the last validation; None: there was none, or its loss was not finite.
        validation_due: a validation was cut short, or has to come before the next step.
    """

    step: int = 0
    skipped_steps: int = 0
    skipped_in_a_row: int = 0
    best: SavedLoss | None = None
    validation: SavedLoss | None = None
    validation_due: bool = False
    loss_scale: LossScale
    spikes: LossSpikes

    def end_step(self, outcome: StepOutcome) -> None:
        """Take in a step."""
        self.step = outcome.step
        self.skipped_in_a_row = 0 if outcome.accepted else self.skipped_in_a_row + 1
        self.skipped_steps += 0 if outcome.accepted else 1
        if outcome.is_finite:
            self.spikes.record(outcome.loss)
        self.loss_scale.update(outcome.is_finite)

    def needs_outcome(self, max_skipped_steps: int) -> bool:
        """Whether the step after the next one depends on what becomes of that.

        It does by the loss scale, by the limit on losses, or where the run could end.
        """
        could_end = self.skipped_in_a_row + 1 >= max_skipped_steps
        return self.loss_scale.enabled or self.spikes.max_sigmas is not None or could_end

    def end_validation(self, loss: float | None) -> None:
        """Take in the validation loss of the present step; None: it was cut short."""
        self.validation_due = loss is None
        if loss is not None:
            self.validation = SavedLoss(self.step, loss) if isfinite(loss) else None

    def note_best(self, saved_step: int | None) -> None:
        """Compare the last validation with the best, if its step is the saved one."""
        if self.validation is None or self.validation.step != saved_step:
            return
        if self.best is None or self.validation.loss < self.best.loss:
            self.best = self.validation

    def to_json(self) -> dict[str, Any]:
        """Plain values, as `state.json` holds them."""
        return {
            "step": self.step,
            "skipped_in_a_row": self.skipped_in_a_row,
            "skipped_steps": self.skipped_steps,
            "best": self.best and asdict(self.best),
            "validation": self.validation and asdict(self.validation),
            "validation_due": self.validation_due,
            "loss_scale": vars(self.loss_scale),
            "spikes": self.spikes.state(),
        }

    def load_json(self, values: dict[str, Any]) -> None:
        """Go on from what `to_json` gave. The loss scale is taken over where both runs have one."""
        self.step = values["step"]
        self.skipped_in_a_row, self.skipped_steps = values["skipped_in_a_row"], values["skipped_steps"]
        self.best = SavedLoss(**values["best"]) if values["best"] else None
        last = values["validation"]  # older checkpoints hold more of it
        self.validation = SavedLoss(last["step"], last["loss"]) if last else None
        self.validation_due = values["validation_due"]
        if self.loss_scale.enabled and values["loss_scale"]["enabled"]:
            vars(self.loss_scale).update(values["loss_scale"])
        self.spikes.load(values["spikes"])
