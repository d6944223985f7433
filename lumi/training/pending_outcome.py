"""What became of a step, while the device may still be at it."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lumi.training.train_state import StepOutcome


def runs_behind(device: torch.device) -> bool:
    """Whether the host only queues work for the device: reading a result waits for all that is queued."""
    return device.type == "cuda"


class Reading:
    """Numbers on their way to the host. Taking them along waits for nothing, reading them does."""

    def __init__(self, numbers: Tensor):
        self._numbers: Tensor = numbers
        self._arrival: torch.cuda.Event | None = None
        if runs_behind(numbers.device):
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._arrival = torch.cuda.Event()
            self._arrival.record()

    def read(self) -> list[float]:
        """The numbers."""
        if self._arrival is not None:
            self._arrival.synchronize()
        return self._numbers.tolist()


class PendingOutcome:
    """A `StepOutcome` whose numbers may still be on the device.

    Args:
        step, lr, num_targets: as there.
        measures: the names of the means behind the loss.
        means: (1 + measures,) of `wide_float` on the device; the loss comes first.
        gradient_norm: scalar of the same type there.
        accepted: bool scalar there.
        micro_losses: (micro-batches,) there.
    """

    def __init__(
        self,
        *,
        step: int,
        lr: float,
        num_targets: int,
        measures: Sequence[str],
        means: Tensor,
        gradient_norm: Tensor,
        accepted: Tensor,
        micro_losses: Tensor,
    ):
        self.step, self.lr, self.num_targets, self.measures = step, lr, num_targets, measures
        scalars = torch.stack([gradient_norm, accepted.to(gradient_norm.dtype)])
        self._reading = Reading(torch.cat([scalars, means, micro_losses.to(means.dtype)]))

    def read(self) -> StepOutcome:
        """The outcome. Waits until the device has done the step."""
        gradient_norm, accepted, loss, *others = self._reading.read()
        count = len(self.measures)
        return StepOutcome(
            step=self.step,
            loss=loss,
            gradient_norm=gradient_norm,
            lr=self.lr,
            num_targets=self.num_targets,
            micro_losses=others[count:],
            accepted=bool(accepted),
            measures=dict(zip(self.measures, others[:count], strict=True)),
        )
