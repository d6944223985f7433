"""The learning rate as a function of the step."""

import math
from dataclasses import dataclass
from typing import Literal

from lumi.config import UserError


@dataclass(frozen=True, kw_only=True)
class CosineSchedule:
    """Linear warm-up, then half a cosine down to `final_lr_ratio` of the peak.

    Loshchilov & Hutter 2017, arXiv:1608.03983.
    """

    kind: Literal["cosine"] = "cosine"
    # Steps of linear warm-up, fewer than num_steps. The last one of them has the peak rate.
    warmup_steps: int = 100
    # The last rate, as a share of the peak.
    final_lr_ratio: float = 0.1

    def __post_init__(self) -> None:
        _check_schedule(self.warmup_steps, self.final_lr_ratio)


@dataclass(frozen=True, kw_only=True)
class WarmupStableDecay:
    """Linear warm-up, a plateau, then linear decay over the last `decay_fraction` of the steps.

    Hu et al. 2024, arXiv:2404.06395.
    """

    kind: Literal["wsd"] = "wsd"
    # Steps of linear warm-up, fewer than num_steps. The last one of them has the peak rate.
    warmup_steps: int = 100
    # The share of all steps in which the rate falls, at the end, after the warm-up.
    decay_fraction: float = 0.2
    # The last rate, as a share of the peak.
    final_lr_ratio: float = 0.0

    def __post_init__(self) -> None:
        _check_schedule(self.warmup_steps, self.final_lr_ratio)
        if not 0 < self.decay_fraction <= 1:
            raise ValueError(f"decay_fraction must be in (0, 1], got {self.decay_fraction}")

    def decay_steps(self, num_steps: int) -> int:
        """Steps in which the rate falls, of a run of `num_steps`; the last one at least."""
        return max(1, round(num_steps * self.decay_fraction))


def check_fits(schedule: CosineSchedule | WarmupStableDecay, num_steps: int) -> None:
    """Raises UserError where a run of `num_steps` ends before its schedule does."""
    warmup = schedule.warmup_steps
    if warmup >= num_steps:
        raise UserError(
            "optimizer.schedule.warmup_steps",
            f"must be less than num_steps = {num_steps}",
            got=warmup,
            remedy="lower it, or train for more steps",
        )
    if isinstance(schedule, WarmupStableDecay) and warmup + schedule.decay_steps(num_steps) > num_steps:
        most = math.floor(100 * (num_steps - warmup) / num_steps) / 100
        raise UserError(
            "optimizer.schedule.decay_fraction",
            f"must be at most {most:g}, what {warmup} steps of warm-up leave of num_steps = {num_steps}",
            got=schedule.decay_fraction,
            remedy="lower it or warmup_steps",
        )


def lr_at(step: int, num_steps: int, peak_lr: float, schedule: CosineSchedule | WarmupStableDecay) -> float:
    """The learning rate of step `step`, counted from 1 to `num_steps`, which `check_fits` has accepted."""
    warmup = schedule.warmup_steps
    if step <= warmup:
        return peak_lr * step / warmup
    if isinstance(schedule, CosineSchedule):
        progress = (step - warmup) / (num_steps - warmup)
        shape = 0.5 * (1 + math.cos(math.pi * progress))
    else:
        shape = min(1.0, (num_steps - step) / schedule.decay_steps(num_steps))
    return peak_lr * (schedule.final_lr_ratio + (1 - schedule.final_lr_ratio) * shape)


def _check_schedule(warmup_steps: int, final_lr_ratio: float) -> None:
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps must be at least 0, got {warmup_steps}")
    if not 0 <= final_lr_ratio <= 1:
        raise ValueError(f"final_lr_ratio must be in [0, 1], got {final_lr_ratio}")
